"""The method on known ground truth, at full length: minutes, so `make test-all` only."""

import pytest

from spd.decompose import decompose
from spd.experiments import resid_mlp, tms
from spd.targets import trained_target
from spd.verdict import try_out


def assert_ideal_passes(experiment, target):
    model, ci_fns = experiment.ideal(target)
    verdict = try_out(model, ci_fns, target.config.data(), experiment.ground_truth(target.config))
    assert verdict.status == "PASS", verdict


@pytest.mark.slow
def test_tms_5_2_is_found(tmp_path):
    config = tms.PRESETS["default"]["tms_5-2"]
    target = trained_target(tms.TMS, tms.TARGETS["tms_5-2"], tms.train_tms, tms.check_tms)
    truth = tms.ground_truth(target.config, target)
    run = decompose(target, target.config.data(), config, truth, out_dir=tmp_path, progress=False)
    assert run.verdict.status == "PASS", run.verdict


@pytest.mark.slow
def test_every_resid_mlp_target_and_its_ideal_decomposition_pass():
    for layers, config in resid_mlp.TARGETS.items():
        target = trained_target(
            resid_mlp.ResidMLP, config, resid_mlp.train_resid_mlp, resid_mlp.check_resid_mlp, tries=1
        )
        assert len(target.layers) == layers
        assert_ideal_passes(resid_mlp, target)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["tms_40-10", "tms_40-10-id"])
def test_tms_40_10_targets_and_their_ideal_decompositions_pass(which):
    target = trained_target(tms.TMS, tms.TARGETS[which], tms.train_tms, tms.check_tms)
    assert_ideal_passes(tms, target)
