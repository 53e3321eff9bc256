"""A run killed anywhere and resumed ends as one that was never killed: parameters, optimiser, random streams and rows."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from spd import spd_run
from spd.decompose import load_run
from spd.files import read_tensors
from spd.runs import RunFolder

STEPS = 200
CHILD = f"""
import os, resource, signal, sys, time
import spd.decompose, spd.files, spd.runs, torch
from spd.experiments.tms import PRESETS, TARGETS, TMS, ground_truth
torch.set_num_threads(1)
out, resume, die_in, die_at = sys.argv[1], sys.argv[2] or None, sys.argv[3], int(sys.argv[4])


def dying(function):  # SIGKILL instead of the `die_at`-th call
    calls = [0]

    def call(*args, **kwargs):
        calls[0] += 1
        if calls[0] == die_at:
            print("dying in", die_in, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


writes = {{"a checkpoint's write": "step_", "the best checkpoint's write": "best."}}
if die_in in writes:  # the file beside is written, and not yet moved to its place
    os_replace, dying_replace = os.replace, dying(os.replace)
    os.replace = lambda a, b: (dying_replace if writes[die_in] in os.path.basename(b) else os_replace)(a, b)
elif die_in == "a full disk":
    log, rows = spd.runs.RunFolder.log, []

    def until_full(self, step, row):
        rows.append(step)
        if len(rows) == die_at:  # from now on no file may grow beyond 1000 bytes
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        log(self, step, row)

    spd.runs.RunFolder.log = until_full
elif die_in == "an evaluation":
    spd.decompose.measure = dying(spd.decompose.measure)
elif die_in == "a step":
    spd.decompose.Stack.batch_gradients = dying(spd.decompose.Stack.batch_gradients)
elif die_in == "nothing, but waits":  # before its first step, for the test
    def waiting(*args, estimate=spd.decompose.estimate):
        while not os.path.exists(os.path.join(out, "go")):
            time.sleep(0.05)
        return estimate(*args)

    spd.decompose.estimate = waiting
elif die_in == "a row's write":
    spd.runs.RunFolder.log = dying(spd.runs.RunFolder.log)
config = PRESETS["default"]["tms_5-2"].replace(
    steps={STEPS}, batch_size=64, log_freq=10, eval_freq=60, save_freq=25, eval_batch_size=256
)
target = TMS(TARGETS["tms_5-2"])
spd.decompose.decompose(
    target, target.config.data(), config, ground_truth(target.config), out_dir=out, resume=resume, progress=False
)
"""


def child(out: Path, resume: Path | str = "", die_in: str = "", die_at: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", CHILD, str(out), str(resume), die_in, str(die_at)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def rows(run: RunFolder) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "_time"} for row in run.rows()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> RunFolder:
    out = tmp_path_factory.mktemp("straight")
    assert child(out).returncode == 0
    return RunFolder(next(out.iterdir()))


@pytest.mark.parametrize(
    "die_in, die_at, saved",
    [
        ("a step", 6 + 137, 125),  # six steps are timed before training
        ("a step", 6 + 1, 0),
        ("a checkpoint's write", 5, 75),
        ("an evaluation", 3, 100),
        ("a row's write", 14, 125),
        ("the best checkpoint's write", 1, 0),
    ],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(tmp_path, straight, die_in, die_at, saved):
    killed = child(tmp_path, die_in=die_in, die_at=die_at)
    assert killed.returncode == -signal.SIGKILL and "dying in" in killed.stdout
    run = RunFolder(next(tmp_path.iterdir()))
    assert run.status()["state"] == "killed"
    assert run.checkpoints()[-1].stem == f"step_{saved:08d}"
    before = rows(run)
    done = child(tmp_path, resume=run.path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert same_state(run, straight)
    assert rows(run)[: len(before)] == before and rows(run) == rows(straight)
    assert run.summary() == straight.summary() and run.status()["state"] == "finished"
    assert not list(run.path.rglob("*.tmp"))


def test_killed_again_and_again(tmp_path, straight):
    for die_at in (6 + 60, 6 + 3, 6 + 40, 6 + 1):  # the steps of each session
        child(tmp_path, resume=next(tmp_path.iterdir(), ""), die_in="a step", die_at=die_at)
    run = RunFolder(next(tmp_path.iterdir()))
    assert run.status()["state"] == "killed" and run.checkpoints()[-1].stem == "step_00000075"
    assert child(tmp_path, resume=run.path).returncode == 0
    assert same_state(run, straight) and rows(run) == rows(straight)


def test_two_do_not_go_on_with_one_run(tmp_path):
    child(tmp_path, die_in="a step", die_at=6 + 30)
    path = next(tmp_path.iterdir())
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(path), "nothing, but waits", "0"]
    pair = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    until = time.time() + 60
    while all(process.poll() is None for process in pair) and time.time() < until:
        time.sleep(0.05)
    (tmp_path / "go").touch()
    said = [process.communicate(timeout=120)[1] for process in pair]
    assert sorted(process.returncode for process in pair) == [0, 1]
    assert any("is still running" in text for text in said)
    steps = [row["_step"] for row in RunFolder(path).rows()]
    assert steps == sorted(set(steps))


def test_a_full_disk_stops_the_run_and_names_the_file(tmp_path):
    done = child(tmp_path, die_in="a full disk", die_at=4)
    (path,) = tmp_path.iterdir()
    assert done.returncode == 1 and f"cannot write {path / 'metrics.jsonl'}" in done.stderr
    run = RunFolder(path)
    assert run.status()["state"] == "failed" and "metrics.jsonl" in run.status()["reason"]
    assert [row["_step"] for row in run.rows()] == [0, 10, 20]


def same_state(a: RunFolder, b: RunFolder) -> bool:
    assert [p.name for p in a.checkpoints()] == [p.name for p in b.checkpoints()]
    ours, theirs = read_tensors(a.checkpoints()[-1])[0], read_tensors(b.checkpoints()[-1])[0]
    assert {k.split(".")[0] for k in ours} == {"parts", "optimizer", "streams"}
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, straight):
    child(tmp_path, die_in="a step", die_at=6 + 137)
    run = RunFolder(next(tmp_path.iterdir()))
    last = run.checkpoints()[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    done = child(tmp_path, resume=run.path)
    assert f"{last.name} is damaged" in done.stderr and f"set aside as {last.stem}.damaged" in done.stderr
    assert same_state(run, straight) and rows(run) == rows(straight)


def test_a_run_that_goes_on_elsewhere_is_not_resumed(tmp_path):
    child(tmp_path, die_in="a step", die_at=6 + 30)
    run = RunFolder(next(tmp_path.iterdir()))
    with run:  # now this process is at it
        refused = child(tmp_path, resume=run.path)
    assert refused.returncode == 1 and f"still running: process {os.getpid()}" in refused.stderr


def test_a_job_that_is_told_to_stop_leaves_checkpoint_and_notebook_and_can_go_on(tmp_path, monkeypatch, capsys):
    """Stopped by the machine, then with Ctrl-C: every time it goes on, in the same folder, to the end."""
    monkeypatch.setenv("IN_TEST", "1")
    monkeypatch.setenv("SPD_RUNS", str(tmp_path))
    told, came_to = ["tms_5-2", "-p", "steps", "2000", "-p", "batch_size", "64"], 0
    steps = lambda: [r["_step"] for p in tmp_path.glob("tms*") for r in RunFolder(p).rows()]
    for times, sent in enumerate((signal.SIGTERM, signal.SIGINT)):
        command = [sys.executable, "-c", f"import sys; from spd.spd_run import main; sys.exit(main({told!r}))"]
        job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        deadline = time.time() + 120
        while time.time() < deadline and sum(s > came_to for s in steps()) < 4:
            time.sleep(0.05)
        job.send_signal(sent)
        said = job.communicate(timeout=60)[1]
        assert job.returncode == 130
        (run,) = map(RunFolder, tmp_path.glob("tms*"))
        assert f"spd-run --resume {run.path}" in said
        assert run.status()["state"] == "interrupted" and "SIGINT after step" in run.status()["reason"]
        before, came_to = came_to, run.load()[1]["step"]
        assert before + 300 <= came_to < 2000 and load_run(run.path).verdict.status == "INCONCLUSIVE"
        kept = [(run.path / name).read_text() for name in ("notebook.ipynb", "notebook-1.ipynb")[: times + 1]]
        assert "2000 steps x" in kept[-1] and all("KeyboardInterrupt" in text for text in kept)
        told = ["--resume", str(run.path)]
    assert spd_run.main(told) == 0
    assert f"Run folder: {run.path}" in capsys.readouterr().out
    assert run.status()["state"] == "finished" and run.rows()[-1]["_step"] == 2000
    assert [(run.path / f"notebook-{i}.ipynb").read_text() for i in (2, 1)] == kept
    assert {f.name for f in (run.path / "figures").iterdir()} >= {"causal_importances.png", "history.png"}
