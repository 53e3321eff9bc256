"""Tracking with the real W&B client against a loopback server: logging, outages, fetching, and no key anywhere."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from wandb_server import WandbServer

from spd.files import read_tensors
from spd.runs import RunFolder
from spd.tracking import read_wandb_log

OURS = ("train/", "eval/", "val")
FOLDERS = ("HOME", "WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")
RUN = """
import sys, torch
import matplotlib.pyplot as plt
import spd.tracking
from spd.decompose import decompose
from spd.experiments.tms import PRESETS, TARGETS, TMS, ground_truth
from spd.tracking import Tracking

spd.tracking.PATIENCE |= {"finish_timeout": 4.0, "init_timeout": 5.0}
torch.set_num_threads(1)
target = TMS(TARGETS["tms_5-2"])
truth = ground_truth(target.config)
short = {"steps": 200, "batch_size": 64, "log_freq": 10, "eval_freq": 100, "eval_batch_size": 256}
config = PRESETS["default"]["tms_5-2"].replace(**short, miracle=truth.miracle({"linear1": 20, "linear2": 20}))
seen, feed = [0], target.config.data()


def data(n, generator):
    seen[0] += 1
    if seen[0] == 100:
        print("half way", flush=True)
        sys.stdin.readline()
    return feed(n, generator)


tracking = Tracking(wandb_mode=sys.argv[2], wandb_project="proj", wandb_group="g", wandb_tags=("toy",), wandb_watch=True)
run = decompose(target, data, config, truth, out_dir=sys.argv[1], tracking=tracking, progress=False)
run.figure("line", plt.figure())
run.finish()
"""


@pytest.fixture(scope="module")
def server():
    with WandbServer() as server:
        yield server
        assert server.unknown == []


@pytest.fixture
def env(server, tmp_path) -> dict[str, str]:
    """The environment of somebody with a key, whose client writes only below `tmp_path`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    places = dict.fromkeys(FOLDERS, str(tmp_path / "home")) | {"SPD_CACHE": str(tmp_path / "cache")}
    return clean | server.env | places


def python(code: str, env: dict[str, str], *args: object, half_way=lambda: None) -> subprocess.CompletedProcess:
    """Run code; its output goes to files, as a wandb-core that outlives it would keep a pipe open."""
    command = [sys.executable, "-c", code, *map(str, args)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=out, stderr=err, text=True)
        text = lambda file: os.pread(file.fileno(), 10**7, 0).decode()
        deadline = time.time() + 120
        while process.poll() is None and "half way" not in text(out) and "half way" in code and time.time() < deadline:
            time.sleep(0.05)
        if process.poll() is None:
            half_way()
        try:
            process.communicate("go on\n", timeout=300)
        finally:
            process.kill()
        return subprocess.CompletedProcess(command, process.returncode, text(out), text(err))


def only(folder: Path) -> RunFolder:
    (path,) = folder.iterdir()
    return RunFolder(path)


def plain(rows: list[dict]) -> list[dict[str, str]]:
    """Steps and our own numbers, without W&B's keys, histograms and pictures; numbers as text, so that NaN equals NaN."""
    kept = [
        {k: repr(float(v)) for k, v in row.items() if isinstance(v, int | float | str) and k.startswith(OURS)}
        | {"_step": row["_step"]}
        for row in rows
    ]
    return [row for row in kept if len(row) > 1]


@pytest.fixture(scope="module")
def tracked(server, tmp_path_factory) -> RunFolder:
    tmp_path = tmp_path_factory.mktemp("tracked")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    done = python(RUN, clean | server.env | dict.fromkeys(FOLDERS, str(tmp_path / "home")), tmp_path / "runs", "online")
    assert done.returncode == 0, done.stderr
    return only(tmp_path / "runs")


def identity(run: RunFolder) -> dict[str, str]:
    return json.loads((run.path / "wandb.json").read_text())


def test_online_the_server_has_what_the_folder_has(server, tracked):
    place = identity(tracked)
    there = server.runs[place["entity"], "proj", place["id"]]
    assert place["name"] == f"local_{place['id']}" == there.display_name
    assert plain(there.history) == plain(tracked.rows())
    assert {"val/miracle_distance", "val_miracle_distance"} <= there.history[0].keys()
    assert any(k.startswith("gradients/") for row in there.history for k in row)
    assert (
        there.config["decompose"] == tracked.config()["decompose"] and there.config["hash"] == tracked.config()["hash"]
    )
    assert (there.state, there.group, there.tags) == ("finished", "g", ["toy"])
    assert any(name.startswith("media/images/figures/line") for name in there.files)
    (artifact,) = there.artifacts
    sent = {name: content for name, content in artifact.files.items() if name.startswith("checkpoints/")}
    assert sent == {f"checkpoints/{p.name}": p.read_bytes() for p in (tracked.path / "checkpoints").iterdir()}


def test_the_key_is_nowhere(server, tracked):
    key = server.env["WANDB_API_KEY"].encode()
    files = [p for p in tracked.path.parent.parent.rglob("*") if p.is_file()]
    assert len(files) > 10
    assert [p for p in files if key in p.read_bytes()] == []


def test_tracking_does_not_change_training(env, tracked, tmp_path):
    assert python(RUN, env, tmp_path / "runs", "disabled").returncode == 0
    alone = only(tmp_path / "runs")
    ours, theirs = (read_tensors(run.checkpoints()[-1])[0] for run in (alone, tracked))
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items()) and plain(alone.rows()) == plain(tracked.rows())
    assert not (alone.path / "wandb").exists() and not (alone.path / "wandb.json").exists()


FETCH = """
import json, sys
from spd.decompose import load_run
from spd.run_data import RunData, find_run, list_runs
at = sys.argv[1]
data = RunData.open(at)
listed = list_runs(at.rsplit("/", 2)[0])
print(json.dumps([str(find_run(at)), float(load_run(at).model["linear1"].V.sum()), data.meta["state"], data.checkpoints,
      len(data.history), data.config["decompose"]["steps"], listed["path"].tolist(), listed["step"].tolist()]))
"""


def test_a_run_at_wandb_is_read_and_fetched_once(server, env, tracked):
    place = identity(tracked)
    at = f"wandb:{place['entity']}/proj/runs/{place['id']}"
    done = python(FETCH, env, at)
    assert done.returncode == 0, done.stderr
    folder, V, state, checkpoints, numbers, steps, paths, last = json.loads(done.stdout.splitlines()[-1])
    assert V == float(read_tensors(tracked.checkpoints()[-1], "parts.model.components.linear1.")[0]["V"].sum())
    assert (state, steps, last) == ("finished", 200, [200]) and paths == [f"wandb:{place['entity']}/proj/{place['id']}"]
    assert any(name.startswith(f"run-{place['id']}:") for name in checkpoints)
    assert numbers == sum(len(row) - 1 for row in plain(tracked.rows()))
    assert RunFolder(folder).config() == tracked.config() and Path(folder).is_relative_to(env["SPD_CACHE"])
    server.down = True
    try:
        again = python(f"from spd.decompose import load_run; print(load_run({at!r}).path)", env)
    finally:
        server.down = False
    assert again.stdout.strip() == folder


ASK = """
import os
import sys
from spd.run_data import find_run
import spd.tracking
spd.tracking.API_SECONDS = 5
try:
    find_run(sys.argv[1])
except Exception as e:
    print(type(e).__name__, flush=True)
    os._exit(0)  # the client may wait for its service, which still tries to reach a server that is down
"""


def test_every_failure_says_which_it_was(server, env, tracked):
    asked = lambda at, **more: python(ASK, env | more, at).stdout.strip()
    assert asked("wandb:tester/proj/runs/none") == "FileNotFoundError"
    assert asked("wandb:tester/proj/runs/none", WANDB_API_KEY="") == "NoKey"
    server.forbidden = {"private"}
    assert asked("wandb:private/proj/runs/none") == "NoAccess"
    server.deny = True
    assert asked("wandb:tester/proj/runs/none") == "NoAccess"
    server.deny, server.down = False, True
    try:
        assert asked("wandb:tester/proj/runs/none") == "NoNetwork"
    finally:
        server.down = False


def test_an_outage_stops_nothing_and_the_run_can_be_sent_later(server, env, tmp_path):
    def cut() -> None:
        server.down = True

    try:
        done = python(RUN, env, tmp_path / "runs", "online", half_way=cut)
    finally:
        server.down = False
    run = only(tmp_path / "runs")
    assert done.returncode == 0 and run.status()["state"] == "finished" and run.rows()[-1]["_step"] == 200
    assert f"spd-run --sync {run.path}" in done.stderr
    place = identity(run)
    there = server.runs[place["entity"], "proj", place["id"]]
    assert len(plain(there.history)) < len(run.rows())
    for _ in range(2):  # twice changes nothing
        sent = python(f"from spd.spd_run import main; raise SystemExit(main(['--sync', {str(run.path)!r}]))", env)
        assert sent.returncode == 0, sent.stderr
        assert plain(there.history) == plain(run.rows())
    assert there.state == "finished"


KILLED = RUN.replace("sys.stdin.readline()", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
GO_ON = RUN.replace('print("half way", flush=True)', "pass").replace("sys.stdin.readline()", "pass")


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_killed_run_goes_on_and_its_mirror_misses_nothing(server, env, tmp_path, mode):
    env = env | {"WANDB_ENTITY": "tester"}
    assert python(KILLED, env, tmp_path / "runs", mode).returncode < 0
    run = only(tmp_path / "runs")
    again = GO_ON.replace("out_dir=sys.argv[1]", f"resume={str(run.path)!r}").replace(
        "tracking=tracking", "tracking=None"
    )
    done = python(again, env, tmp_path / "runs", mode)
    assert done.returncode == 0, done.stderr
    there = (
        server.runs["tester", "proj", identity(run)["id"]].history if mode == "online" else read_wandb_log(run.path)[0]
    )
    assert (
        [row["_step"] for row in plain(there)] == [row["_step"] for row in plain(run.rows())] == list(range(0, 201, 10))
    )
    assert plain(there) == plain(run.rows())


def test_offline_leaves_a_log_that_equals_the_rows_and_that_wandb_can_sync(server, env, tmp_path):
    done = python(RUN, env | {"WANDB_API_KEY": "", "WANDB_ENTITY": "tester"}, tmp_path / "runs", "offline")
    assert done.returncode == 0, done.stderr
    run = only(tmp_path / "runs")
    history, config = read_wandb_log(run.path)
    assert plain(history) == plain(run.rows())
    assert config["decompose"] == run.config()["decompose"]
    (log,) = (run.path / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "sync", "--yes", "-e", "tester", "-p", "proj", str(log)]
    assert subprocess.run(command, env=env, capture_output=True, text=True).returncode == 0
    there = server.runs["tester", "proj", identity(run)["id"]]
    assert plain(there.history) == plain(run.rows())
    assert {a.name for a in there.artifacts} == {f"run-{identity(run)['id']}"}


def test_online_without_a_key_stops_before_anything_is_done(env, tmp_path):
    done = python(RUN, env | {"WANDB_API_KEY": ""}, tmp_path / "runs", "online")
    assert done.returncode == 1 and "NoKey: wandb_mode 'online' needs WANDB_API_KEY" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_job_with_a_key_leaves_it_nowhere(env, tmp_path):
    planted = "planted-" * 5
    command = ["tms_5-2", "-p", "steps", "20", "-p", "wandb_mode", "offline"]
    code = f"import sys; from spd.spd_run import main; sys.exit(main({command!r}))"
    keys = {"WANDB_API_KEY": planted, "HF_TOKEN": planted + "2", "IN_TEST": "1", "SPD_RUNS": str(tmp_path / "runs")}
    done = python(code, env | keys)
    assert done.returncode == 0, done.stderr
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any(p.name == "notebook.ipynb" for p in files) and any(p.suffix == ".wandb" for p in files)
    assert [p for p in files if b"planted-planted" in p.read_bytes()] == []
    assert "planted" not in done.stdout + done.stderr
