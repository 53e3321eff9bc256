"""On a device like CUDA or MPS all that a run makes is there, and is what it would be on the CPU."""

from typing import Any

import device
import graphs
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spd import decompose as decomposing
from spd import kernels, steps
from spd.certify import certified_report
from spd.config import CI_FN_FIELDS, LOSSES, DecomposeConfig, Losses, make_generator
from spd.decompose import decompose, load_run
from spd.runs import RunFolder
from spd.experiments import resid_mlp, tms
from spd.losses import step_gradients
from spd.metrics import ce_kl_under_masks, ci_tables, pgd_ladder
from spd.registry import TOYS, find_experiment, settings
from spd.steps import InputKind, Stack, TrainState

SMALL = {"losses__importance_minimality__p": 2.0, "faithfulness_warmup__steps": 5, "eval_batch_size": 64}
TINY = tms.PRESETS["default"]["tms_5-2"].replace(steps=10, batch_size=64, modules={"linear*": 7}, **SMALL)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch) -> str:
    """The device; and no compiled functions on the CPU, as they draw other random numbers."""
    monkeypatch.setattr(kernels, "_have", False)
    return device.start()


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, ids):
        return self.head(self.wte(ids))


def some_ids(n, generator):
    return torch.randint(7, (n, 3), generator=generator, device=generator.device)


def test_the_device_is_as_strict_as_cuda_and_mps(elsewhere):
    here, there = torch.ones(3, 3), torch.ones(3, 3, device=elsewhere)
    for mix in (lambda: there + here, lambda: there @ here, lambda: torch.cat([here, there]), lambda: there.numpy()):
        with pytest.raises((RuntimeError, TypeError), match="device"):
            mix()
    with pytest.raises(RuntimeError, match="float64 is not known here"):
        there.double()
    with pytest.raises(RuntimeError, match="generator of cpu"):
        torch.rand(3, device=elsewhere, generator=make_generator(0, "x"))
    drawn = [torch.rand(9, device=d, generator=make_generator(0, "x", d)) for d in ("cpu", elsewhere)]
    assert torch.equal(drawn[0], drawn[1].cpu())


WAITING = {  # operations whose outcome the CPU must know, or that copy a list from it
    *("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"),
    *("bincount", "lift_fresh"),
}


class NeverWaits(TorchDispatchMode):
    """Nothing inside may need to know what is on the device: on a GPU the CPU would have to wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(ts) if isinstance(t, Tensor)] for ts in ((args, kwargs), out))
        name, here = func.overloadpacket.__name__, [t.device.type == device.NAME for t in (*given, *made)]
        waits = name in WAITING or (name.startswith("index") and any(t.dtype == torch.bool for t in given[1:]))
        crossing = any(here) and any(t.is_cpu and t.dim() for t in (*given, *made))
        assert not (any(here) and waits) and not crossing, func
        return out


def test_waiting_is_noticed(elsewhere):
    x = torch.ones(3, device=elsewhere)
    list_of_numbers = lambda: torch.tensor([1.0, 2.0], device=elsewhere)
    for wait in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.cpu(), lambda: x[[0, 2]], list_of_numbers):
        with pytest.raises(AssertionError), NeverWaits():
            wait()


def compare_steps(target: nn.Module, data, configs: list[DecomposeConfig], elsewhere: str) -> None:
    """Some steps here and there, from the same start: losses, importances and all that changes are the same."""
    made = []
    for d in ("cpu", elsewhere):
        states = [TrainState.of(target, c.replace(seed=seed), d) for seed, c in enumerate(configs)]
        for state in states:
            state.start(data)
        kind = InputKind.of(states[0].parts.model, data, configs[0].batch_size, len(states))
        stack = Stack(
            states, data, kind, lambda *given: step_gradients(*given)
        )  # no number in it may change: as if compiled
        for n in range(5 if len(states) > 1 else 3):
            if n == 3:
                states[0].prune(data, kind)
            if n == 4:
                stack.keep(states[1:])
            with NeverWaits():
                losses, ci, _ = stack.gradients()
                stack.update()
        made.append({"losses": losses, "ci": ci, "states": [s.tensors() for s in states]})
        assert all(t.device.type == d for t in (*losses.values(), *ci.values(), *stack.params))
    torch.testing.assert_close(made[1], made[0], check_device=False, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("changes", [{}, {"use_delta_component": False, "sampling": "binomial"}])
def test_every_loss(loss, changes, elsewhere):
    target = tms.TMS(tms.TARGETS["tms_5-2"])
    losses = Losses.model_validate({"importance_minimality": {"coeff": 3e-3, "frequency": 0.1}, loss: 0.5})
    compare_steps(target, target.config.data(), [TINY.replace(losses=losses, **changes)], elsewhere)


@pytest.mark.parametrize("kind", CI_FN_FIELDS)
def test_every_importance_function(kind, elsewhere):
    target = resid_mlp.ResidMLP(resid_mlp.TARGETS[2].replace(n_features=6, d_embed=8, d_mlp=4))
    small: dict = {"kind": kind}
    if kind == "global_shared_transformer":
        small |= {"d_model": 8, "n_heads": 2, "n_blocks": 1}
    elif kind != "linear":
        small |= {"hidden": (8,)}
    with sdpa_kernel(SDPBackend.MATH):  # the CPU has one of its own
        compare_steps(target, target.config.data(), [TINY.replace(modules={"*": 5}, ci_fn=small)], elsewhere)


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon"}, {"accumulate": 2}, {"grad_clip_components": 0.1}])
@pytest.mark.parametrize("other", [{}, {"lr__start": 2e-3, "losses__importance_minimality__p": 1.5}])
def test_two_runs_side_by_side(changes, other, elsewhere):
    target, config = tms.TMS(tms.TARGETS["tms_5-2"]), TINY.replace(**changes)
    compare_steps(target, target.config.data(), [config, config.replace(**other)], elsewhere)


def as_if_compiled(*given: Any) -> Any:
    return step_gradients(*given)


@pytest.fixture
def recorded(elsewhere, monkeypatch) -> list[graphs.CUDAGraph]:
    """Steps that are not `step_gradients` itself become graphs on the simulated device, too; the graphs that were made."""
    made = []

    class Kept(graphs.CUDAGraph):
        def __init__(self):
            super().__init__()
            made.append(self)

    for name, stand_in in (graphs.stand_ins(NeverWaits) | {"CUDAGraph": Kept}).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(steps, "may_record", lambda device: device.type == elsewhere)
    return made


ADVERSARIES = {"losses__persistent_pgd_recon": 0.5, "losses__merged_recon_subset": 0.5, "losses__pgd_recon": 0.5}


@pytest.mark.parametrize(
    "changes, n_graphs",
    [
        ({}, 2),
        ({"optimizer": "muon"}, 1),
        ({"accumulate": 2, **ADVERSARIES}, 2),
        ({"losses__importance_minimality__final_p": 1.0, "hold_components": 0.6, "grad_clip_components": 0.1}, 2),
        ({"sampling": "binomial", "losses__stochastic_recon_subset": 0.5}, 2),
    ],
)
@pytest.mark.parametrize("n_runs", [1, 3])
def test_recorded_steps(changes, n_graphs, n_runs, elsewhere, recorded):
    """With schedules, a pruning and a run that drops out: the steps whose operations are started one by one."""
    target, config = tms.TMS(tms.TARGETS["tms_5-2"]), TINY.replace(prune_at=(0.6,), **changes)
    data, made = target.config.data(), []
    for compute in (step_gradients, as_if_compiled):
        states = [TrainState.of(target, config.replace(seed=seed), elsewhere) for seed in range(n_runs)]
        for state in states:
            state.start(data)
        kind = InputKind.of(states[0].parts.model, data, config.batch_size, n_runs)
        stack, losses = Stack(states, data, kind, compute), []
        for n in range(12):
            if n == 6:
                for state in states:
                    state.prune(data, kind)
            if n == 8 and n_runs > 1:
                stack.keep(states[:-1])
            losses.append({k: v.clone() for k, v in stack.gradients()[0].items()})
            stack.update()
        made.append({"losses": losses, "states": [s.tensors() for s in states]})
    replays = [9] if n_runs == 1 else [5, 1]  # all but the first three steps of that many runs
    assert [g.replays for g in recorded] == [n for n in replays for _ in range(n_graphs)]
    torch.testing.assert_close(made[1], made[0], atol=1e-6, rtol=1e-4)


def test_recorded_steps_on_batches_of_several_sizes(elsewhere, recorded):
    """Those of another size than the recorded one are not replays, and leave nothing behind that disturbs one."""
    target, made = tms.TMS(tms.TARGETS["tms_5-2"]), []
    for compute in (step_gradients, as_if_compiled):
        sizes, state = iter((64, 64, 64, 64, 60, 64, 60, 64)), TrainState.of(target, TINY, elsewhere)
        data = lambda n, g, sizes=sizes: target.config.data()(next(sizes), g)
        stack = Stack([state], data, InputKind(None, ()), compute)
        for _ in range(8):
            stack.gradients()
            stack.update()
        made.append(state.tensors())
    assert [g.replays for g in recorded] == [3, 5]
    torch.testing.assert_close(made[1], made[0])


class Waiting(tms.TMS):
    """A target of which the CPU has to know a number."""

    def forward(self, x):
        return super().forward(x) if x.isfinite().all() else x


@pytest.mark.parametrize("kind, n_graphs, says", [(tms.TMS, 3, "compiled in"), (Waiting, 0, "no CUDA graph of a step")])
@pytest.mark.parametrize("seeds", [None, (0, 1)])
def test_a_run_of_recorded_steps(kind, n_graphs, says, seeds, elsewhere, recorded, tmp_path, monkeypatch, capsys):
    """The rows and the end of one whose operations are started one by one, also if it is resumed; some targets have no graph."""
    function = {"off": step_gradients, "on": as_if_compiled}
    monkeypatch.setattr(decomposing, "step_function", lambda compile, device: function[compile])
    changes = {"steps": 20, "prune_at": (0.5,), "log_freq": 1, "eval_freq": 10, "save_freq": 12, "n_eval_batches": 2}
    target, config = kind(tms.TARGETS["tms_5-2"]), TINY.replace(keep_checkpoints=9, miracle=None, **changes)

    def rows(compile: str, **how) -> list:
        run = decompose(
            target, target.config.data(), config, device=elsewhere, seeds=seeds, compile=compile, progress=False, **how
        )
        for r in [run] if seeds is None else run:
            r.folder.checkpoints()[-1].unlink()  # as if it had been killed after step 12
        paths.append([r.path for r in ([run] if seeds is None else run)])
        return [[{k: v for k, v in row.items() if k != "_time"} for row in RunFolder(p).rows()] for p in paths[-1]]

    paths: list = []
    expected, found = rows("off", out_dir=tmp_path), rows("on", out_dir=tmp_path)
    assert len(recorded) == n_graphs and says in capsys.readouterr().out
    assert len(found[0]) >= 20
    assert found == [[pytest.approx(row, rel=1e-4, abs=1e-6) for row in run] for run in expected]
    resumed = rows("on", resume=paths[1][0] if seeds is None else paths[1])
    assert resumed == [[pytest.approx(row, rel=1e-4, abs=1e-6) for row in run] for run in expected]
    assert len(recorded) == 2 * n_graphs


@pytest.mark.parametrize("which", ["tms_5-2-id", "resid_mlp2", "tokens"])
def test_a_run_and_what_is_made_of_it(which, elsewhere, tmp_path):
    short = {"steps": 20, "log_freq": 5, "eval_freq": 10, "batch_size": 64, "n_eval_batches": 2, "miracle": None}
    if which == "tokens":
        torch.manual_seed(0)
        target, data, truth = Tokens(), some_ids, None
        config = TINY.replace(modules={"*": 8}, output_loss="kl", identities=["head"], **short)
    else:
        toy = TOYS[str(find_experiment(which).notebook)]
        described: Any
        described, config = settings(which, "default")
        if which == "resid_mlp2":
            described, config = described.replace(n_features=9, d_embed=20, d_mlp=10), config.replace(modules={"*": 12})
        target = toy.kind(described)
        data, truth = described.data(), toy.truth(target)
        config = config.replace(prune_at=(0.5,), **short, **SMALL)
    runs = [
        decompose(target, data, config, truth, out_dir=tmp_path, device=d, progress=False) for d in ("cpu", elsewhere)
    ]
    losses = [{(row["_step"], k): v for row in r.rows for k, v in row.items() if "loss" in k} for r in runs]
    assert len(losses[0]) > 15
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    here, there = runs
    assert all(p.device.type == elsewhere for p in there.parts.parameters())
    assert all(p.device.type == "cpu" for p in load_run(there.path, target).parts.parameters())
    torch.testing.assert_close(
        parameters_to_vector(there.parts.parameters()).cpu(), parameters_to_vector(here.parts.parameters())
    )
    found = []
    for run, d in zip(runs, ("cpu", elsewhere), strict=True):
        x = data(8, make_generator(0, "x", d))
        with torch.no_grad():
            out, inputs = run.model.clean(x)
            ci = run.ci_fns(run.model, inputs).lower
        ladder = pgd_ladder(
            run.model, x, out, ci, make_generator(0, "attack", d), rungs=(2, 4), kind=config.output_loss
        )
        if which == "tokens":
            more = ce_kl_under_masks(run.model, x, out, ci, make_generator(0, "masks", d))["kl"].values()
        else:
            more = certified_report(run.model, run.ci_fns, x, splits=3).found.mean
            assert all(t.device.type == d for t in ci_tables(run.model, run.ci_fns, x.shape[1]).values())
        found.append([*ladder.values(), *more])
    assert len(found[0]) > 3 and found[1] == pytest.approx(found[0], rel=1e-2)
