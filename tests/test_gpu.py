"""The same run on a GPU: same initialisation, everything on the device, a loadable folder."""

import pytest
import torch

from spd.config import DecomposeConfig, Losses, SparseFeatures
from spd.decompose import Decomposition, decompose, load_run
from spd.experiments.tms import TMS, TMSConfig, ground_truth

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_run_on_cuda(tmp_path):
    target = TMS(TMSConfig(identity=True))
    config = DecomposeConfig(
        modules={"*": 12},
        losses=Losses.model_validate(
            {"importance_minimality": {"coeff": 3e-3}, "stochastic_recon": 1, "stochastic_recon_subset": 1}
        ),
        steps=30,
        batch_size=256,
    )
    data = SparseFeatures(n_features=5)
    run = decompose(target, data, config, ground_truth(target.config), out_dir=tmp_path, device="cuda", progress=False)
    assert all(p.device.type == "cuda" for p in run.parts.parameters())
    assert torch.isfinite(torch.tensor([r["train/loss/total"] for r in run.rows if "train/loss/total" in r])).all()
    loaded = load_run(run.path)  # on the CPU
    x = torch.rand(7, 5)
    torch.testing.assert_close(loaded.model(x), run.model(x.cuda()).cpu(), atol=1e-5, rtol=1e-4)
    start = Decomposition(target, config).model["linear1"].V
    assert torch.equal(start, Decomposition(target, config).to("cuda").model["linear1"].V.cpu())
