"""The stand-in for the Weights & Biases server, tried with the real client."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb_server import WandbServer

pytest.importorskip("wandb")
pytestmark = pytest.mark.slow

FOLDERS = ("HOME", "WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")
MISSING, FORBIDDEN = "Could not find run <Run team/proj/none (not found)>", "permission denied"
HEAD = """
import json, pathlib, sys, time
import numpy as np, wandb

def init(**more):
    return wandb.init(entity="team", project="proj", id="one", **more)

def failure(call):
    try:
        return call()
    except Exception as error:
        return [type(error).__name__, str(error)]

def checkpoint(run, text, *aliases):
    pathlib.Path("out").mkdir(exist_ok=True)
    pathlib.Path("out/step=2.ckpt").write_text(text)
    artifact = wandb.Artifact("weights", "model", metadata={"text": text})
    artifact.add_file("out/step=2.ckpt")
    artifact.add_file("out/step=2.ckpt", name="sub folder/again.ckpt")
    return run.log_artifact(artifact, aliases=["latest", *aliases])
"""


class Client:
    """Runs code in a fresh Python, in a folder of its own; the result is what the code gives to `answer`."""

    def __init__(self, server: WandbServer, folder: Path):
        clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        self.env = {**clean, **server.env, **dict.fromkeys(FOLDERS, str(folder)), "WANDB_SILENT": "true"}
        self.folder = folder

    def run(self, code: str, started: Callable[[], None] = lambda: None) -> Any:
        """`started` is called when the code prints that it started; the code then reads a line to go on."""
        command = [sys.executable, "-c", f"{HEAD}\nanswer = lambda value: print('ANSWER', json.dumps(value))\n{code}"]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, cwd=self.folder, env=self.env, text=True, stdin=pipe, stdout=pipe, stderr=pipe
        ) as process:
            if "started" in code:
                assert process.stdout and process.stdout.readline() == "started\n"
                started()
            out, err = process.communicate("go on\n", timeout=60)
        assert process.returncode == 0, err
        answers = [line.removeprefix("ANSWER ") for line in out.splitlines() if line.startswith("ANSWER ")]
        return json.loads(answers[-1]) if answers else None


@pytest.fixture
def server():
    with WandbServer() as server:
        yield server


@pytest.fixture
def client(server: WandbServer, tmp_path: Path):
    return Client(server, tmp_path)


LOGGING = """
import torch
run = init(mode=sys_mode, config={"lr": 0.1, "model": {"width": 3}}, tags=["a", "b"], group="g", name="nice")
model = torch.nn.Linear(2, 2)
run.watch(model, log="all", log_freq=1)
for step in range(3):
    model(torch.ones(1, 2)).sum().backward()
    run.log({"loss": step / 2, "val/acc": step, "nan": float("nan")}, step=10 * step)
run.log({"image": wandb.Image(np.zeros((4, 4, 3), dtype="uint8"))}, step=20)
run.summary["best"] = 7
checkpoint(run, "hello", "best")
run.save("out/step=2.ckpt", base_path="out")
run.finish()
"""


def check_logged(server: WandbServer) -> None:
    """That the server has what LOGGING logged."""
    run = server.runs["team", "proj", "one"]
    assert run.config == {"lr": 0.1, "model": {"width": 3}}
    assert (run.state, run.tags, run.group, run.display_name) == ("finished", ["a", "b"], "g", "nice")
    rows = [[row[key] for key in ("_step", "loss", "val/acc", "nan")] for row in run.history]
    assert rows == [[0, 0, 0, "NaN"], [10, 0.5, 1, "NaN"], [20, 1, 2, "NaN"]]
    assert sum(run.history[0]["gradients/weight"]["values"]) == 4
    assert (run.summary["best"], run.summary["loss"], run.summary["_step"]) == (7, 1, 20)
    assert run.files["step=2.ckpt"] == b"hello"
    assert run.files[run.history[2]["image"]["path"]].startswith(b"\x89PNG")
    [artifact] = run.artifacts
    assert (artifact.name, artifact.type, artifact.aliases) == ("weights", "model", ["best", "latest"])
    assert artifact.files == {"step=2.ckpt": b"hello", "sub folder/again.ckpt": b"hello"}
    assert server.unknown == []


READING = """
api = wandb.Api()
run = api.run("team/proj/one")
run.file("step=2.ckpt").download(root="files")
artifacts = run.logged_artifacts()
artifacts[0].download(root="artifact")
api.artifact("team/proj/weights:best").download(root="alias")
answer({
    "fields": [run.config, run.state, run.tags, run.group, run.name, run.summary["best"], run.summary["loss"]],
    "rows": [[row["_step"], row["loss"], row["nan"]] for row in run.history(pandas=False)],
    "keys": run.history(keys=["val/acc"], pandas=False),
    "sampled": [row["_step"] for row in run.history(samples=2, pandas=False)],
    "frame": run.history(keys=["loss"])["loss"].tolist(),
    "files": {file.name: file.size for file in run.files(per_page=2)},
    "artifacts": [[a.name, a.type, a.aliases, a.version, a.metadata, a.size] for a in artifacts],
    "downloads": {str(p): p.read_text() for root in ("files", "artifact", "alias") for p in pathlib.Path(root).rglob("*.*")},
    "runs": [[r.id, r.config["lr"], r.summary["best"]] for r in api.runs("team/proj", filters={})],
    "filtered": [len(api.runs("team/proj", filters={"config.lr": lr, "state": "finished"})) for lr in (0.1, 0.2)],
    "no run": failure(lambda: api.run("team/proj/none")),
    "no project": failure(lambda: api.run("team/none/one")),
    "no artifact": failure(lambda: api.artifact("team/proj/none:latest")),
})
"""


def test_a_run_logged_online_can_be_read_back(server: WandbServer, client: Client):
    client.run(f"sys_mode = 'online'{LOGGING}")
    check_logged(server)
    got = client.run(READING)
    assert got["fields"] == [{"lr": 0.1, "model": {"width": 3}}, "finished", ["a", "b"], "g", "nice", 7, 1]
    assert got["rows"] == [[0, 0, "NaN"], [10, 0.5, "NaN"], [20, 1, "NaN"]]
    assert got["keys"] == [{"_step": 0, "val/acc": 0}, {"_step": 10, "val/acc": 1}, {"_step": 20, "val/acc": 2}]
    assert (got["sampled"], got["frame"]) == ([0, 20], [0, 0.5, 1])
    sizes = {name: len(data) for name, data in server.runs["team", "proj", "one"].files.items()}
    assert got["files"] == sizes and {"step=2.ckpt", "config.yaml", "wandb-summary.json"} < set(sizes)
    assert got["artifacts"] == [["weights:v0", "model", ["best", "latest"], "v0", {"text": "hello"}, 10]]
    names = [f"{root}/{name}" for root in ("artifact", "alias") for name in ("step=2.ckpt", "sub folder/again.ckpt")]
    assert got["downloads"] == dict.fromkeys(["files/step=2.ckpt", *names], "hello")
    assert (got["runs"], got["filtered"]) == ([["one", 0.1, 7]], [1, 0])
    assert got["no run"] == ["CommError", MISSING]
    assert got["no project"] == ["CommError", "Could not find run <Run team/none/one (not found)>"]
    assert got["no artifact"] == ["CommError", "artifact membership 'none:latest' not found in 'team/proj'"]
    assert ("POST", "/graphql", "RunFullHistory") in server.requests and server.unknown == []


def test_an_offline_run_can_be_synced(server: WandbServer, client: Client, tmp_path: Path):
    client.run(f"sys_mode = 'offline'{LOGGING}")
    assert server.requests == []
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    client.run(f"from wandb.cli.cli import cli\ncli(['sync', {str(folder)!r}], standalone_mode=False)")
    check_logged(server)


def test_a_resumed_run_goes_on_after_its_last_step(server: WandbServer, client: Client):
    first = "run = init(config={'lr': 1}, tags=['a'], group='g')\nfor i in range(3): run.log({'loss': i})\n"
    client.run(first + "checkpoint(run, 'early', 'best')")
    code = """
run = init(resume="allow", config={"more": 2})
run.log({"loss": 30}, step=1)  # a step that was, so it is left out
run.log({"loss": 3})
checkpoint(run, "early")  # the same again
checkpoint(run, "late", "best")
answer([run.starting_step, run.resumed, dict(run.config), run.summary["loss"]])
sys.exit(1)
"""
    with pytest.raises(AssertionError):
        client.run(code)
    run = server.runs["team", "proj", "one"]
    assert [(row["_step"], row["loss"]) for row in run.history] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert (run.config, run.tags, run.group, run.state) == ({"lr": 1, "more": 2}, ["a"], "g", "failed")
    versions = [(artifact.version, artifact.aliases, artifact.files["step=2.ckpt"]) for artifact in run.artifacts]
    assert versions == [(0, [], b"early"), (1, ["best", "latest"], b"late")]
    again = client.run("run = init(resume='allow'); answer([run.starting_step, run.resumed, dict(run.config)])")
    assert again == [4, True, {"lr": 1, "more": 2}]
    assert run.state == "finished" and server.unknown == []


def test_a_key_without_access_is_refused(server: WandbServer, client: Client):
    code = "answer([failure(call) for call in (init, lambda: wandb.Api().run('team/proj/none'))])"
    server.forbidden = {"team"}
    assert client.run(code) == [["CommError", FORBIDDEN], ["CommError", FORBIDDEN]]
    server.deny = True
    init, read = client.run(code)
    assert init == ["CommError", "user is not logged in"]
    assert read[0] == "AuthenticationError" and "user is not logged in" in read[1]
    assert server.runs == {} and server.unknown == []


OUTAGE = """
run = init(settings=wandb.Settings(finish_timeout=2, finish_timeout_raises=True))
print("started", flush=True)
sys.stdin.readline()
for i in range(3): run.log({"loss": i})  # log_artifact would raise: it asks the server first
answer(failure(run.finish))
"""


@pytest.mark.parametrize("fault", ["down", "busy"])
def test_what_an_outage_held_back_can_be_synced(fault: str, server: WandbServer, client: Client, tmp_path: Path):
    def fail() -> None:
        setattr(server, fault, True)

    assert client.run(OUTAGE, started=fail) == ["TimeoutError", "Timed out finishing run."]
    run = server.runs["team", "proj", "one"]
    assert (run.state, run.history) == ("running", [])
    setattr(server, fault, False)
    [folder] = (tmp_path / "wandb").glob("run-*")
    client.run(
        f"from wandb.cli.cli import cli\ncli(['sync', '--no-skip-online', {str(folder)!r}], standalone_mode=False)"
    )
    assert ([row["loss"] for row in run.history], run.state) == ([0, 1, 2], "finished")
    assert server.unknown == []


def test_the_default_entity_and_what_is_not_emulated(server: WandbServer, client: Client):
    client.run("wandb.init(project='a project', id='two', resume='allow').log({'loss': 1})")
    assert client.run("answer(wandb.Api().run('a project/two').history(pandas=False)[0]['loss'])") == 1
    assert server.runs["tester", "a project", "two"].state == "finished" and server.unknown == []
    error = client.run("answer(failure(lambda: list(wandb.Api().projects('team'))))")
    assert "not emulated: GetProjects" in error[1] and set(server.unknown) == {"GetProjects"}


SWEEP = {"method": "grid", "program": "try.py", "parameters": {"b": {"values": [1, 2]}, "a": {"values": [5e-07, 0.1]}}}
TRY = """
import json, sys, time, wandb
run = wandb.init(config={"a": 3, "c": 4})
json.dump([sys.argv[1:], dict(run.config)], open(run.id + ".json", "w"))
for _ in range(600 if run.config["b"] == 9 else 1):
    run.log({"loss": run.config["a"]})
    time.sleep(0.1)
"""
AGENT = """
from wandb.cli.cli import cli
from wandb.wandb_agent import Agent
Agent.POLL_INTERVAL = 0.5  # seconds; a real one waits 5
cli(['agent', 'team/proj/sweep0'], standalone_mode=False)
"""


def test_an_agent_tries_a_grid_in_the_order_of_wandb(server: WandbServer, client: Client, tmp_path: Path):
    (tmp_path / "try.py").write_text(TRY)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))  # in JSON 5e-07 would be a text for YAML
    client.run("from wandb.cli.cli import cli\ncli(['sweep', '-e', 'team', '-p', 'proj', 'sweep.yaml'])")
    sweep = server.sweeps["sweep0"]
    client.run(AGENT)
    assert [tuple(point.items()) for point in sweep.runs.values()] == [
        (("a", a), ("b", b)) for a in (5e-07, 0.1) for b in (1, 2)
    ]
    for id, point in sweep.runs.items():
        run = server.runs["team", "proj", id]
        assert (run.state, run.sweep, run.config) == ("finished", "sweep0", {**point, "c": 4})
        assert [row["loss"] for row in run.history] == [point["a"]]
    given, config = json.loads((tmp_path / "sweep0run0.json").read_text())
    assert (given, config) == (["--a=5e-07", "--b=1"], {"a": 5e-07, "b": 1, "c": 4})
    assert sweep.told == [("run", id) for id in sweep.runs] + [("exit", "")]
    assert sweep.state == "FINISHED" and server.unknown == []


def test_a_run_of_a_sweep_is_stopped_and_a_sweep_too(server: WandbServer, client: Client, tmp_path: Path):
    (tmp_path / "try.py").write_text(TRY)
    server.points = [{"a": 1, "b": 9}, {"a": 2, "b": 1}, {"a": 3, "b": 1}]
    config = {**SWEEP, "method": "random", "run_cap": 2}
    assert client.run(f"answer(wandb.sweep({config!r}, entity='team', project='proj'))") == "sweep0"
    sweep = server.sweeps["sweep0"]
    sweep.stop("sweep0run0")
    client.run(AGENT)
    assert list(sweep.runs.values()) == server.points[:2] and ("stop", "sweep0run0") in sweep.told
    assert server.runs["team", "proj", "sweep0run1"].state == "finished"
    state = "from wandb.cli.cli import cli\ncli(['sweep', '--{}', 'team/proj/sweep1'], standalone_mode=False)"
    client.run(f"wandb.sweep({SWEEP!r}, entity='team', project='proj')")
    for action, result in [("pause", "PAUSED"), ("resume", "RUNNING"), ("cancel", "CANCELED")]:
        client.run(state.format(action))
        assert server.sweeps["sweep1"].state == result
    assert server.unknown == []
