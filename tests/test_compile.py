"""torch.compile: the same numbers, and a way on where it fails."""

import pytest
import torch

from spd.decompose import decompose, step_function
from spd.experiments import tms
from spd.steps import InputKind, Stack, TrainState

CONFIG = tms.PRESETS["default"]["tms_5-2"].replace(steps=1000, faithfulness_warmup__steps=20)
ANNEALED = {  # with a coefficient that kills no component within the steps looked at: see below
    "losses__importance_minimality__coeff": 3e-3,
    "losses__importance_minimality__p": 2.0,
    "losses__importance_minimality__final_p": 1.0,
}
ADVERSARY = {"losses__persistent_pgd_recon": 0.5, "accumulate": 2}
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train_both(changes: dict, steps: int, n_runs: int = 1, device: str = "cpu") -> list[Stack]:
    """The same runs for some steps, eager and compiled; it is one graph, and not anew for every value of a schedule."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    target, config, stacks = tms.TMS(tms.TARGETS["tms_5-2"]).to(device), CONFIG.replace(**changes), []
    data = target.config.data()
    for compile in ("off", "on"):
        states = [TrainState.of(target, config.replace(seed=seed), device) for seed in range(n_runs)]
        for state in states:
            state.start(data)
        kind = InputKind.of(states[0].parts.model, data, config.batch_size, n_runs)
        stacks.append(Stack(states, data, kind, step_function(compile, device)))
    for _ in range(steps):
        for stack in stacks:
            stack.gradients()
            stack.update()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    return stacks


@pytest.mark.parametrize(
    "changes, steps",
    [({}, 1000), (ANNEALED, 100)],  # at p = 2 gradients vanish, and Adam makes rounding errors of dead components large
)
def test_compiled_steps_are_the_eager_ones(changes, steps):
    for eager, compiled in zip(*(s.parts.parameters() for s in train_both(changes, steps)), strict=True):
        torch.testing.assert_close(eager, compiled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes, n_runs", [(ADVERSARY, 1), ({}, 2)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_compiled_adversaries_and_runs_side_by_side(changes, n_runs, device):
    for eager, compiled in zip(*(s.states for s in train_both(changes, 20, n_runs, device)), strict=True):
        compiled_ones = compiled.tensors()
        for name, value in eager.tensors().items():
            if name.startswith(("parts.", "sources.")):
                torch.testing.assert_close(value, compiled_ones[name], atol=1e-4, rtol=1e-4)


def test_a_compiler_that_fails_is_given_up_with_a_message(tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        def fail(*_, **__):
            raise RuntimeError("no C++ compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    target = tms.TMS(tms.TARGETS["tms_5-2"])
    short = CONFIG.replace(steps=3, eval_batch_size=64)
    run = decompose(target, target.config.data(), short, out_dir=tmp_path, compile="on", progress=False)
    assert (
        "torch.compile failed (RuntimeError), so steps are not compiled: no C++ compiler here"
        in capsys.readouterr().out
    )
    assert run.folder.status()["state"] == "finished"


def test_compile_is_on_off_or_auto(tmp_path):
    target = tms.TMS(tms.TARGETS["tms_5-2"])
    with pytest.raises(ValueError, match="must be 'auto', 'on' or 'off', got 'yes'"):
        decompose(target, target.config.data(), CONFIG, out_dir=tmp_path, compile="yes")
    assert not list(tmp_path.iterdir())
