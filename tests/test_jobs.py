"""Notebooks as jobs, with a real kernel: wrong parameters stop at once, a good run reports, a killed run keeps its rows."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spd import jobs
from spd.decompose import load_run
from spd.runs import RunFolder

NBS = Path(__file__).parent.parent / "nbs"


def papermill(notebook: str, out: Path, *parameters: str, **env: str) -> subprocess.CompletedProcess:
    """What a user types; `IN_TEST=1` in `env` makes the notebook shrink to its smoke size."""
    args = [a for name, value in zip(parameters[::2], parameters[1::2], strict=True) for a in ("-p", name, value)]
    command = [sys.executable, "-m", "papermill", str(NBS / notebook), str(out), *args, "--no-progress-bar"]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=300)


@pytest.mark.parametrize(
    "notebook, name, value, says",
    [
        ("10_resid_mlp.ipynb", "n_layer", "2", "did you mean 'n_layers'?"),
        ("11_tms.ipynb", "C", "3", "5 mechanisms to find but only C=3"),
    ],
)
def test_a_wrong_parameter_stops_before_any_training(tmp_path, notebook, name, value, says):
    out = tmp_path / "out.ipynb"
    places = {"SPD_RUNS": str(tmp_path / "runs"), "SPD_CACHE": str(tmp_path / "cache")}
    done = papermill(notebook, out, name, value, **places, IN_TEST="1")
    assert done.returncode == 1
    assert says in done.stderr
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


def test_a_job_reports_its_run(tmp_path):
    done = papermill(
        "11_tms.ipynb", tmp_path / "out.ipynb", "steps", "40", "seed", "3", SPD_RUNS=str(tmp_path / "runs"), IN_TEST="1"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = jobs.find_record(tmp_path / "out.ipynb")
    assert record is not None
    folder = RunFolder(record["path"])
    assert folder.path.parent == tmp_path / "runs"
    assert folder.config()["decompose"]["seed"] == 3
    assert folder.status()["state"] == "finished"
    assert record["verdict"]["status"] == folder.summary()["verdict"]["status"] == "FAIL"  # 40 steps are no training
    assert {f.name for f in (folder.path / "figures").iterdir()} >= {"causal_importances.png", "history.png"}
    worst = json.loads((folder.path / "certificate.json").read_text())
    assert worst["found"]["worst"][0] > 2 * worst["ideal"]["worst"][1]
    assert f"Run folder: {folder.path}" in jobs.report(tmp_path / "out.ipynb")
    again = load_run(folder.path)  # the target is rebuilt from the folder alone
    assert again.verdict.status == "FAIL" and again.model["linear1"].V.shape == (5, 20)


KILLED = """
import sys
from spd.decompose import decompose
from spd.experiments.tms import PRESETS, TARGETS, TMS, ground_truth
config = PRESETS["default"]["tms_5-2"].replace(
    steps=100_000, batch_size=64, log_freq=5, eval_freq=1000, save_freq=int(sys.argv[2]), eval_batch_size=256
)
target = TMS(TARGETS["tms_5-2"])
decompose(target, target.config.data(), config, ground_truth(target.config), out_dir=sys.argv[1], progress=False)
"""


@pytest.mark.parametrize("save_freq, wait_for_rows", [(10, 60), (1_000_000, 20)])
def test_a_killed_run_keeps_its_rows_and_a_loadable_checkpoint(tmp_path, save_freq, wait_for_rows):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), str(save_freq)])
    rows = lambda: [line for f in tmp_path.glob("*/metrics.jsonl") for line in f.read_text().splitlines()]
    try:
        deadline = time.time() + 120
        while time.time() < deadline and len(rows()) < wait_for_rows:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    (run,) = map(RunFolder, tmp_path.iterdir())
    steps = [r["_step"] for r in run.rows() if "train/loss/total" in r]
    saved = int(run.checkpoints()[-1].stem.removeprefix("step_"))
    assert steps == list(range(0, 5 * len(steps), 5)) and len(steps) >= wait_for_rows - 2 and steps[-1] >= saved - 5
    assert json.loads((run.path / "status.json").read_text())["state"] == "running"  # nobody could say otherwise
    loaded = load_run(run.path)
    assert loaded.verdict.status == "INCONCLUSIVE"
    assert loaded.model["linear1"].V.isfinite().all()
