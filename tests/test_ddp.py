"""A run trained by two processes: its gradients are those of the whole batch, and it writes one folder, stops and resumes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spd.decompose import decompose, load_run
from spd.experiments.tms import PRESETS, TARGETS, TMS
from spd.runs import RunFolder
from spd.steps import is_empty

SMALL = {
    "batch_size": 512,
    "steps": 20,
    "log_freq": 5,
    "eval_freq": 10,
    "save_freq": 10,
    "eval_batch_size": 128,
    "prune_at": (0.5,),
}
OF_ROWS = {"losses__persistent_pgd_recon": 1, "losses__persistent": {"scope": "per_row", "n_steps": 2}}
CHILD = f"""
import json, signal, sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map

from spd.config import DecomposeConfig, Losses, SparseFeatures, make_generator
from spd.decompose import decompose, load_run, step_function
from spd.experiments.tms import PRESETS, TARGETS, TMS, ground_truth
from spd.losses import step_gradients
from spd.steps import InputKind, Stack, TrainState, draw_inputs, from_all, join_ranks, ranks, trained, with_noise

torch.set_num_threads(1)
out, found = Path(sys.argv[1]), {{}}
join_ranks("cpu")
rank, n = ranks()


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        generator = make_generator(0, "tokens")
        self.wte, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, ids):
        return self.head(self.wte(ids))


def same_on_all(tensors):
    each = from_all([t.detach() for t in tensors])
    return all(torch.equal(a, b) for other in each[1:] for a, b in zip(each[0], other))


def gradient_error(target, data, config):  # of one step, against one process with the batches of all; largest gradient
    state = TrainState.of(target, config)
    state.start(data)
    kind = InputKind.of(state.parts.model, data, config.batch_size // n)
    before = {{k: g.get_state() for k, g in vars(state.streams).items()}}
    mine = with_noise(draw_inputs(data, config, [state.streams]), config, state.parts.Cs, [state.streams], kind)
    for k, g in vars(state.streams).items():
        g.set_state(before[k])
    batches = from_all(mine)
    assert not torch.equal(batches[0].x, batches[1].x)
    together = lambda *t: None if t[0] is None else t[0] if len(t[0]) == 1 else torch.cat(t)  # one adversary, or all rows
    whole = tree_map(together, *batches)
    stack = Stack([state], data, kind)
    sources = tree_map(lambda *t: t[0] if t[0].shape == (2,) else together(*t), *from_all(stack.sources))
    sources = tree_map(torch.clone, sources)
    losses, *_ = stack.gradients()
    own = [p.grad for p in trained(state.parts).values()]
    shape, _ = stack.minimality(0)
    params = list(trained(state.parts).values())
    alone, _, ascended, expected = step_gradients(
        params, state.parts.model, state.parts.ci_fns, whole.x, whole.weight, whole.noise, config, shape, whole.tilt,
        sources=sources,
    )
    moved, wanted = ([s for site in found.values() for s in site.values()] for found in (stack.sources, ascended))
    rows = config.losses.persistent.scope == "per_row"
    assert same_on_all([*own, *losses.values(), *(t for s in moved if not rows for t in s)])
    for a, b in zip(moved, wanted, strict=True):
        if rows:  # of how large gradients are, half the mean over twice the rows, Adam makes nothing, but for the smallest ones
            assert (a.r - b.r.chunk(n)[rank]).abs().quantile(0.99) < 1e-3
        else:
            assert all((u - v).abs().max() < 1e-3 * v.abs().max() for u, v in zip(a, b))
    assert bool(moved) == bool(config.losses.persisting())
    assert all(abs(losses[k] - alone[k]) <= 1e-6 * max(1, alone[k]) for k in losses)
    return max((a - b).abs().max().item() for a, b in zip(own, expected)), max(g.abs().max().item() for g in expected), kind.rows


tms = TMS(TARGETS["tms_5-2"])
config = PRESETS["default"]["tms_5-2"].replace(**{SMALL})
data, truth = tms.config.data(), ground_truth(tms.config)
few = {{"coeff": 1e-2, "p": 2, "frequency": 1}}
every = Losses(importance_minimality=few, stochastic_recon=1, pgd_recon=1, ci_recon=1, hidden_acts_recon=1)
lasting = dict(losses__persistent_pgd_recon=1, losses__merged_recon_subset=1, losses__persistent__n_steps=2)
of_batch = dict(losses__pgd_recon=1, losses__pgd=dict(shared=True, init="random", step_size=0.3, n_steps=2))
ids = lambda n, generator: torch.randint(7, (n, 3), generator=generator)
adversaries = every.replace(hidden_acts_recon=0, persistent_pgd_recon=1, persistent__scope="per_row")
tokens = DecomposeConfig(modules={{"*": 5}}, losses=every.replace(hidden_acts_recon=0), output_loss="kl", batch_size=64, steps=1)
found["gradients"] = {{
    "tms": gradient_error(tms, data, config),
    "every loss": gradient_error(tms, data, config.replace(losses=every.model_dump(), sampling="binomial")),
    "lasting adversaries": gradient_error(tms, data, config.replace(**lasting)),
    "an adversary for each row": gradient_error(tms, data, config.replace(**{OF_ROWS})),
    "an adversary for each batch": gradient_error(tms, data, config.replace(**of_batch)),
    "tokens": gradient_error(Tokens(), ids, tokens),
    "tokens, each with an adversary": gradient_error(Tokens(), ids, tokens.replace(losses=adversaries)),
}}

step_function("on", "cpu")  # the settings it makes; but what counts the graphs needs no C++ compiler
state = TrainState.of(tms, config.replace(losses__importance_minimality=few, **lasting, **of_batch))
kind = InputKind.of(state.parts.model, data, config.batch_size // n)
Stack([state], data, kind, torch.compile(step_gradients, backend="aot_eager", dynamic=False)).gradients()
found["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]

config = config.replace(**{OF_ROWS})
straight = decompose(tms, data, config, truth, out_dir=out, name="straight", progress=False)
found["same parameters"] = same_on_all(straight.parts.parameters())
found["same verdict"] = len(set(map(str, from_all(str(straight.verdict))))) == 1
found["streams"] = len(set(straight.folder.load("last", "streams.")[0])), sorted(straight.folder.load("last", "streams.")[0])

calls = [0]


def interrupted(n, generator):  # only rank 0 is told to stop, in the middle of step 13
    calls[0] += (batch := n == config.batch_size // 2)
    if batch and rank == 0 and calls[0] == 3 + 6 + 14:  # three are looked at, six are timed beforehand
        signal.raise_signal(signal.SIGTERM)
    return data(n, generator)


try:
    decompose(tms, interrupted, config, truth, out_dir=out, name="stopped", progress=False)
except KeyboardInterrupt as e:
    found["stopped"] = from_all(str(e))
(stopped,) = out.glob("stopped-*")
resumed = decompose(tms, interrupted, config, truth, resume=stopped, progress=False)
pairs = list(zip(straight.parts.state_dict().values(), resumed.parts.state_dict().values()))
found["resumed equals straight"] = all(torch.equal(a, b) for a, b in pairs)
found["refused"] = []
for wrong in (config.replace(batch_size=511), [config, config.replace(seed=1)]):
    try:
        decompose(tms, data, wrong, truth, out_dir=out, progress=False)
    except ValueError as e:
        found["refused"].append(str(e))
found = from_all(found)
if rank == 0:
    print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found, rank 0 first, and where their runs are."""
    out, script = tmp_path_factory.mktemp("ddp"), tmp_path_factory.mktemp("script") / "child.py"
    script.write_text(CHILD)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run([*torchrun, str(script), str(out)], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [text for text in done.stdout.splitlines() if text.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND ")), out


@pytest.mark.parametrize(
    "case",
    [
        *("tms", "every loss", "lasting adversaries", "an adversary for each row", "an adversary for each batch"),
        *("tokens", "tokens, each with an adversary"),
    ],
)
def test_gradients_are_those_of_the_whole_batch(two, case):
    for found in two[0]:
        error, largest, rows = found["gradients"][case]
        assert error < 1e-6 * largest
        assert (rows is None) == case.startswith("tokens")  # all-zero rows are merged where there are any


def test_a_compiled_step_stays_one_graph(two):
    assert [mine["graphs"] for mine in two[0]] == [1, 1]


def test_one_run_one_folder(two):
    found, out = two
    assert sorted(p.name.split("-")[0] for p in out.iterdir()) == ["stopped", "straight"]
    (path,) = out.glob("straight-*")
    run = RunFolder(path)
    assert [r["_step"] for r in run.rows()] == [0, 5, 10, 15, 20]
    assert run.status()["state"] == "finished"
    assert run.config()["extra"]["ranks"] == 2
    assert "before step 10, components emptied: {'linear1': " in (path / "training.log").read_text()
    assert is_empty(load_run(path).model["linear1"]).any()  # after rank 0 pruned, all go on with the same parameters
    for mine in found:
        assert mine["same parameters"] and mine["same verdict"]
        assert mine["streams"][1] == ["1.data", "1.masks", "data", "masks"]
    first, second = (run.load("last", prefix)[0]["data"] for prefix in ("streams.", "streams.1."))
    assert not torch.equal(first, second)
    first, second = (run.load("last", f"sources.{r}persistent_pgd_recon.linear1.")[0]["r"] for r in ("", "1."))
    assert first.shape == second.shape and not torch.equal(first, second)  # the adversaries of either process's rows
    assert load_run(path).verdict.status == "FAIL"  # after 20 steps


def test_a_stop_is_everyones_and_resumes(two):
    found, _ = two
    for mine in found:
        assert len(set(mine["stopped"])) == 1
        assert "SIGTERM after step 14" in mine["stopped"][0]
        assert mine["resumed equals straight"]


def test_what_cannot_be_shared_is_refused(two):
    found, out = two
    for mine in found:
        odd, several = mine["refused"]
        assert "batch_size 511 is no multiple of 2" in odd
        assert "2 processes train one run, got 2" in several
    (path,) = out.glob("straight-*")
    target, config = TMS(TARGETS["tms_5-2"]), PRESETS["default"]["tms_5-2"].replace(**SMALL | OF_ROWS)
    with pytest.raises(
        ValueError, match="checkpoint of 2 processes cannot be resumed by 1.*torchrun --nproc_per_node 2"
    ):
        decompose(target, target.config.data(), config, load_truth(path), resume=path, progress=False)


def load_truth(path: Path):
    from spd.verdict import GroundTruth

    return GroundTruth.model_validate(RunFolder(path).config()["truth"])
