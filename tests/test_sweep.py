"""Sweeps and evaluations for real: agents as processes, kernels, run folders; stopped, killed, taken up again."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from spd.files import read_json
from spd.runs import RunFolder
from spd.study import open_study, trial_records

SMALL = ["-p", "steps", "60", "-p", "batch_size", "64"]


@pytest.fixture
def env(tmp_path) -> dict[str, str]:
    return os.environ | {
        "IN_TEST": "1",
        "SPD_RUNS": str(tmp_path / "runs"),
        "OMP_NUM_THREADS": "1",
    }


def command(module: str, *args: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; from spd.{module} import main; sys.exit(main({list(args)!r}))"]


def run(env: dict[str, str], module: str, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(module, *args), env=env, capture_output=True, text=True, timeout=300)


def sweep_file(tmp_path: Path, **content) -> str:
    path = tmp_path / "sweep.yaml"
    metric = {"name": "val/miracle_distance", "goal": "minimize"}
    path.write_text(yaml.safe_dump({"method": "grid", "metric": metric} | content))
    return str(path)


def until(true: Callable[[], object], seconds: float = 150) -> None:
    deadline = time.time() + seconds
    while not true():
        assert time.time() < deadline, "it did not happen in time"
        time.sleep(0.05)


def only(folder: Path) -> Path:
    (one,) = folder.iterdir()
    return one


def outcomes(sweep: Path) -> list[str]:
    return [t["outcome"] for t in trial_records(sweep)]


def test_a_grid_runs_side_by_side_and_reports(tmp_path, env):
    points = {"seed": {"values": [0, 1]}, "importance_coeff": {"values": [1e-3, 3e-3]}}
    done = run(
        env,
        "spd_sweep",
        "tms_5-2",
        "1",
        "--pack",
        "4",
        "--sweep_params_file",
        sweep_file(tmp_path, parameters=points),
        *SMALL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    sweep = only(tmp_path / "runs" / "sweeps")
    assert outcomes(sweep) == ["finished"] * 4
    assert len(list((sweep / "packs").iterdir())) == 1  # one process for all
    for trial in trial_records(sweep):
        folder = RunFolder(trial["run"])
        asked = folder.config()["decompose"]
        assert (asked["seed"], asked["losses"]["importance_minimality"]["coeff"]) == (
            trial["point"]["seed"], trial["point"]["importance_coeff"]
        )  # fmt: skip
        assert trial["value"] == min(r["val/miracle_distance"] for r in folder.rows() if "val/miracle_distance" in r)
    assert "Report: " in done.stdout and (sweep / "sweep_report.html").stat().st_size > 20_000
    with open(sweep / "sweep.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_what_is_stopped_or_killed_goes_on(tmp_path, env):
    """Ctrl-C to the command, then SIGKILL to the agent: the same run folder, from its checkpoint, to the end."""
    told = ["tms_5-2", "1", "--sweep_params_file", sweep_file(tmp_path, parameters={"seed": {"values": [5, 6]}})]
    told += ["-p", "steps", "1500", "-p", "batch_size", "64"]
    first = subprocess.Popen(command("spd_sweep", *told), env=env, stderr=subprocess.PIPE, text=True)
    rows = lambda: [r for p in (tmp_path / "runs").glob("sweeps/*/trials/0000") for r in RunFolder(p).rows()]
    until(lambda: len(rows()) > 3)
    first.send_signal(signal.SIGINT)
    said = first.communicate(timeout=120)[1]
    sweep = only(tmp_path / "runs" / "sweeps")
    assert first.returncode == 130 and f"spd-sweep --resume {sweep} 1" in said
    trial = RunFolder(sweep / "trials" / "0000")
    assert trial.status()["state"] == "interrupted" and outcomes(sweep) == ["interrupted"]
    stopped_at = trial.load()[1]["step"]

    second = subprocess.Popen(
        command("spd_sweep", "--resume", str(sweep), "1"), env=env, stderr=subprocess.PIPE, text=True
    )
    until(lambda: rows()[-1]["_step"] > stopped_at)
    family = [psutil.Process(second.pid), *psutil.Process(second.pid).children(recursive=True)]
    for process in family:  # the agent, its kernel, its job and that one's kernel
        process.kill()
    second.communicate(timeout=60)
    psutil.wait_procs(family, 10)

    third = run(env, "spd_sweep", "--resume", str(sweep), "2")
    assert third.returncode == 0, third.stderr[-3000:]
    assert outcomes(sweep) == ["finished", "finished"]
    assert [p.name for p in sorted((sweep / "trials").iterdir())] == ["0000", "0001"]
    steps = [r["_step"] for r in trial.rows()]
    assert steps == sorted(set(steps)) and steps[-1] == 1500 and trial.status()["state"] == "finished"
    states = [t.state.name for t in open_study(sweep).get_trials()]
    assert states.count("COMPLETE") == 2 and states.count("FAIL") == 2
    assert len(list(trial.path.glob("provenance*.json"))) >= 2  # it was gone on with


def test_a_run_that_falls_behind_is_stopped(tmp_path, env):
    """Two good learning rates, then one that learns nothing: hyperband ends it early, with its verdict and notebook."""
    points = {"lr": {"values": [1e-3, 2e-3, 1e-7]}}
    file = sweep_file(tmp_path, parameters=points, early_terminate={"type": "hyperband", "min_iter": 2, "eta": 2})
    told = ["tms_5-2", "1", "--sweep_params_file", file, "-p", "steps", "2000", "-p", "batch_size", "64"]
    done = run(env, "spd_sweep", *told)
    assert done.returncode == 0, done.stderr[-3000:]
    sweep = only(tmp_path / "runs" / "sweeps")
    assert outcomes(sweep)[2] == "stopped" and outcomes(sweep)[0] == "finished"
    slow = RunFolder(sweep / "trials" / "0002")
    assert slow.rows()[-1]["_step"] < 2000 and slow.status()["reason"] == trial_records(sweep)[2]["reason"]
    assert "needed at most" in slow.status()["reason"] and slow.summary()["verdict"]["status"] == "FAIL"
    assert (slow.path / "notebook.ipynb").exists() and (slow.path / "checkpoints").is_dir()
    assert open_study(sweep).get_trials()[2].state.name == "PRUNED"


def test_an_evaluation_says_what_is_not_as_expected(tmp_path, env):
    done = run(env, "spd_evals", "--experiments", "tms_5-2,tms_5-2-id", "--workers", "2", *SMALL)
    assert done.returncode == 1, done.stderr[-3000:]  # 60 steps are no training, and both are expected to PASS
    evals = only(tmp_path / "runs" / "evals")
    with open(evals / "evals.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["experiment"], r["verdict"], r["ok"]) for r in rows] == [
        ("tms_5-2", "FAIL", "NO"),
        ("tms_5-2-id", "FAIL", "NO"),
    ]
    assert (evals / "evals_report.html").stat().st_size > 20_000
    assert read_json(evals / "jobs" / "tms_5-2" / "job_status.json")["state"] == "done"
    again = run(env, "spd_evals", "--report", str(evals))
    assert again.returncode == 1 and again.stdout.startswith("experiment")
