"""A sweep for real: `wandb sweep`, `wandb agent` and our notebooks, against a W&B server on this machine."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from wandb_server import Sweep, WandbServer

from spd.decompose import load_run
from spd.files import cache_root
from spd.jobs import report
from spd.runs import RunFolder

pytest.importorskip("wandb")

KEY = "planted" * 6
FOLDERS = ("HOME", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")
CLI = """
from wandb.cli.cli import cli
from wandb.wandb_agent import Agent
Agent.POLL_INTERVAL = 0.5  # seconds; a real one waits 5
cli()
"""
EXAMPLE = yaml.safe_load((Path(__file__).parent.parent / "nbs" / "data" / "sweep_tms.yaml").read_text())


@pytest.fixture(scope="module")
def server():
    with WandbServer() as server:
        yield server
        assert server.unknown == []


class Client:
    """`wandb …` as somebody types it, in a folder of their own, with a key that must not be found again."""

    def __init__(self, server: WandbServer, folder: Path):
        clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        path = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        places = dict.fromkeys(FOLDERS, str(folder / "home")) | {"SPD_CACHE": str(cache_root())}
        self.runs, self.folder, self.server = folder / "runs", folder, server
        self.env = (
            clean | server.env | path | places | {"WANDB_API_KEY": KEY, "SPD_RUNS": str(self.runs), "IN_TEST": "1"}
        )

    def wandb(self, *args: str, until: Callable[[], None] = lambda: None) -> tuple[int, str]:
        """The exit code and what was printed; `until` runs meanwhile. Nothing that was started is left."""
        with tempfile.TemporaryFile("w+", dir=self.folder) as out:
            command = [sys.executable, "-c", CLI, *args]
            process = psutil.Popen(command, cwd=self.folder, env=self.env, stdout=out, stderr=out)
            try:
                until()
                process.wait(240)
            finally:
                for left in [*process.children(recursive=True), process] if process.is_running() else []:
                    left.kill()
            return process.wait(), os.pread(out.fileno(), 10**7, 0).decode()

    def sweep(self, **config: Any) -> Sweep:
        """A sweep like the example, but for `config`, begun from a file."""
        (self.folder / "sweep.yaml").write_text(yaml.safe_dump(EXAMPLE | config))
        code, said = self.wandb("sweep", "-e", "team", "-p", "proj", "sweep.yaml")
        assert code == 0, said
        return [*self.server.sweeps.values()][-1]

    def folders(self) -> dict[str, RunFolder]:
        """The run folders by their W&B ids."""
        return {json.loads((path / "wandb.json").read_text())["id"]: RunFolder(path) for path in self.runs.iterdir()}


@pytest.fixture
def client(server, tmp_path) -> Client:
    return Client(server, tmp_path)


def test_an_agent_runs_a_notebook_for_every_point(server, client):
    fixed = {"steps": {"value": 60}, "seed": {"value": 3}}
    sweep = client.sweep(method="grid", parameters=fixed | {"lr": {"values": [5e-07, 0.002]}})
    with ThreadPoolExecutor() as pool:  # two agents
        ended = [pool.submit(client.wandb, "agent", f"team/proj/{sweep.id}") for _ in range(2)]
    assert [agent.result()[0] for agent in ended] == [0, 0]
    assert sweep.told == [*(("run", id) for id in sweep.runs), ("exit", ""), ("exit", "")], ended[0].result()[1]
    assert [point["lr"] for point in sweep.runs.values()] == [5e-07, 0.002]
    assert set(client.folders()) == set(sweep.runs)
    for id, folder in client.folders().items():
        there, point = server.runs["team", "proj", id], sweep.runs[id]
        assert (there.state, there.sweep, folder.status()["state"]) == ("finished", sweep.id, "finished")
        assert {name: there.config[name] for name in point} == point
        assert there.config["decompose"]["lr"]["start"] == point["lr"] == folder.config()["decompose"]["lr"]["start"]
        assert folder.config()["extra"]["parameters"].items() >= point.items()
        origin = json.loads((folder.path / "provenance.json").read_text())["environment"]
        assert (origin["WANDB_SWEEP_ID"], origin["WANDB_RUN_ID"]) == (sweep.id, id)
        metric = [(row["_step"], row["val/miracle_distance"]) for row in there.history if "val/miracle_distance" in row]
        assert metric == [
            (row["_step"], row["val/miracle_distance"]) for row in folder.rows() if "val/miracle_distance" in row
        ]
        assert [step for step, _ in metric] == [0, 60]
        assert f"Run folder: {folder.path}" in report(folder.path / "notebook.ipynb")
    files = [path for path in client.folder.rglob("*") if path.is_file()]
    assert len(files) > 30 and [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_a_stopped_run_is_no_failure_and_a_wrong_parameter_is_one(server, client):
    server.points = [{"steps": 1_000_000}, {"importance_coef": 0.1, "steps": 60}, {"steps": 60}]
    sweep = client.sweep(parameters={"steps": {"value": 60}})

    def stop() -> None:
        deadline = time.time() + 90
        first = "team", "proj", f"{sweep.id}run0"
        while time.time() < deadline and (first not in server.runs or len(server.runs[first].history) < 3):
            time.sleep(0.1)
        sweep.stop(first[-1])

    code, said = client.wandb("agent", "--max-consecutive-failed-runs", "1", f"team/proj/{sweep.id}", until=stop)
    assert "did you mean 'importance_coeff'?" in said and "allowed: C, batch_size" in said
    assert "Detected 1 consecutive failed runs" in said
    stopped, wrong = sweep.runs  # after the stopped one the agent went on, after the wrong one not
    [(id, folder)] = client.folders().items()
    assert id == stopped and ("team", "proj", wrong) not in server.runs
    assert folder.status()["state"] == "interrupted" and f"spd-run --resume {folder.path}" in folder.status()["reason"]
    run, rows = load_run(folder.path), folder.rows()
    assert 0 < int(folder.checkpoints()[-1].stem.removeprefix("step_")) < 1_000_000 and len(rows) >= 3
    assert run.model["linear1"].V.isfinite().all()
    assert "steps x" in (folder.path / "notebook.ipynb").read_text()  # what the notebook had shown until then
    there = server.runs["team", "proj", stopped]
    assert [row["_step"] for row in there.history if "train/loss/total" in row] == [row["_step"] for row in rows]
    assert there.state != "running"


def test_our_command_makes_a_sweep_there_and_starts_agents(server, client):
    """`spd-sweep --backend wandb`: the same file, W&B chooses the points, its agent is a job like any other."""
    (client.folder / "sweep.yaml").write_text(
        yaml.safe_dump({"method": "grid", "parameters": {"seed": {"values": [4]}}})
    )
    told = ["tms_5-2", "1", "--backend", "wandb", "--sweep_params_file", "sweep.yaml", "-p", "steps", "40"]
    code = f"import sys; from spd.spd_sweep import main; sys.exit(main({told!r}))"
    places = client.env | {"WANDB_ENTITY": "team", "WANDB_PROJECT": "proj"}
    done = subprocess.run([sys.executable, "-c", code], cwd=client.folder, env=places, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    sweep = [*server.sweeps.values()][-1]
    assert f"W&B sweep: team/proj/{sweep.id}" in done.stdout
    assert [*sweep.runs.values()] == [{"seed": 4, "steps": 40}]
    (run,) = [r for r in server.runs.values() if r.sweep == sweep.id]
    assert run.state == "finished" and run.config["decompose"]["seed"] == 4
    files = [path for path in client.folder.rglob("*") if path.is_file()]
    assert len(files) > 30 and [path for path in files if KEY.encode() in path.read_bytes()] == []
