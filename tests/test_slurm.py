"""Jobs on a real SLURM cluster (see slurm.py): arrays, failures, refusals, cancelling, lives that end before the work does."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import guards
import nbformat
import psutil
import pytest
from slurm import cluster  # noqa: F401

from spd import spd_evals, spd_run, spd_sweep
from spd.files import read_json
from spd.jobs import Job, job_state
from spd.runs import RunFolder
from spd.slurm import Resources, SlurmJob, Watch, cancel, submit, wait
from spd.snapshot import Snapshot, take_snapshot
from spd.study import Sweep, trial_records

CPU = Resources(gpus=0, cpus=1, minutes=30)
PARAMETERS = 'seed = 0\nwhat = ""'
TINY = """
import json, os, spd, time
from pathlib import Path
run = Path(os.environ["SPD_RUN_DIR"])
life = len(list(run.glob("life-*")))
said = dict(seed=seed, code=spd.__path__[0], here=os.getcwd(), kernel=os.getpid(), marker="as submitted")
said |= {k: os.environ.get(k) for k in ("CUDA_VISIBLE_DEVICES", "SLURM_CPUS_PER_TASK", "SLURMD_NODENAME", "WANDB_API_KEY")}
(run / f"life-{life}.json").write_text(json.dumps(said))
if what == "fail":
    raise ValueError(f"seed {seed} is no good")
if what == "wait" and life == 0:
    time.sleep(300)
"""

TRAIN = """
from spd.decompose import decompose
from spd.experiments.tms import PRESETS, TARGETS, TMS, ground_truth
config = PRESETS["default"]["tms_5-2"].replace(
    steps=steps, batch_size=64, log_freq=20, eval_freq=400, save_freq=200, eval_batch_size=256
)
target = TMS(TARGETS["tms_5-2"])
decompose(target, target.config.data(), config, ground_truth(target.config), progress=False)
"""


def write_notebook(path: Path, parameters: str, source: str) -> None:
    new = nbformat.v4
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    cells = [new.new_code_cell(parameters, metadata={"tags": ["parameters"]}), new.new_code_cell(source)]
    nbformat.write(new.new_notebook(metadata=kernel, cells=cells), str(path))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A repository like this one, with two new notebooks that git does not know yet."""
    repo = guards.copy_repo(tmp_path_factory.mktemp("checkout"))
    git = ["git", "-C", str(repo), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.hooksPath="]
    for args in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *args], check=True, capture_output=True)
    write_notebook(repo / "nbs" / "95_tiny.ipynb", PARAMETERS, TINY)
    write_notebook(repo / "nbs" / "96_train.ipynb", "steps = 10", TRAIN)
    return repo


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("places")
    return {"SPD_RUNS": str(root / "runs"), "IN_TEST": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def environment(places, monkeypatch) -> None:
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PYTHONPATH", raising=False)


@pytest.fixture
def snapshot(checkout) -> Snapshot:
    return take_snapshot(checkout)


def tiny(folder: Path, snapshot: Snapshot, seed: int = 0, what: str = "") -> Path:
    """A run folder with a job of the tiny notebook."""
    job = Job(notebook="95_tiny.ipynb", parameters={"seed": seed, "what": what}, code=str(snapshot.path))
    return job.write(folder / f"run-{seed}")


def lives(run: Path) -> list[dict]:
    """What each life of a tiny job said."""
    return [read_json(p) for p in sorted(run.glob("life-*.json"))]


def until(true: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.time() + seconds
    while not true():
        assert time.time() < deadline, "it did not happen in time"
        time.sleep(0.1)


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, text=True, capture_output=True, timeout=30).stdout


def no_kernel_of(*runs: Path) -> None:
    kernels = [life["kernel"] for run in runs for life in lives(run)]
    assert kernels
    until(lambda: not any(psutil.pid_exists(pid) for pid in kernels), 10)


def test_an_array_runs_the_code_it_was_submitted_with(cluster, checkout, snapshot, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("WANDB_API_KEY", "only-in-the-environment-0123")
    runs = [tiny(tmp_path, snapshot, seed, "fail" if seed == 1 else "") for seed in range(3)]
    jobs = submit(runs, snapshot.path, Resources(gpus=1, cpus=1, minutes=30, parallel=2), "tiny")
    write_notebook(checkout / "nbs" / "95_tiny.ipynb", PARAMETERS, TINY.replace("as submitted", "edited"))
    (checkout / "spd" / "__init__.py").write_text("raise ImportError('a half-written edit')\n")
    states = wait(jobs, every=1)
    subprocess.run(["git", "-C", str(checkout), "checkout", "-q", "spd"], check=True)
    write_notebook(checkout / "nbs" / "95_tiny.ipynb", PARAMETERS, TINY)

    assert [state.word for state in states] == ["done", "failed", "done"]
    assert "ValueError: seed 1 is no good" in states[1].reason
    last = capsys.readouterr().out.splitlines()[-1]
    assert "2 done" in last and "1 failed" in last
    for seed, run in enumerate(runs):
        (said,) = lives(run)
        assert (said["seed"], said["marker"]) == (seed, "as submitted")
        assert said["code"] == str(snapshot.path / "spd")
        assert (said["CUDA_VISIBLE_DEVICES"], said["SLURM_CPUS_PER_TASK"]) in {("0", "1"), ("1", "1")}
        assert said["WANDB_API_KEY"] == "only-in-the-environment-0123"
        assert (run / "notebook.ipynb").exists() and SlurmJob.of(run) == jobs[seed]
        assert job_state(run)["state"] == ("failed" if seed == 1 else "done")
    written = [p for place in (jobs[0].log.parent, *runs) for p in place.rglob("*") if p.is_file()]
    assert not [
        p for p in written if b"only-in-the-environment-0123" in p.read_bytes() and not p.name.startswith("life-")
    ]
    no_kernel_of(*runs)


def test_cancelled_jobs_end_whether_they_ran_or_waited(cluster, snapshot, tmp_path):  # noqa: F811
    runs = [tiny(tmp_path, snapshot, seed, "wait") for seed in range(2)]
    jobs = submit(runs, snapshot.path, CPU.replace(parallel=1))
    until(lambda: lives(runs[0]))
    watch = Watch(jobs)
    assert [state.word for state in watch.look()] == ["running", "pending"]
    assert watch.look()[1].reason == "JobArrayTaskLimit"
    cancel(jobs)
    assert [state.word for state in wait(jobs, progress=False)] == ["cancelled", "cancelled"]
    assert not lives(runs[1])
    no_kernel_of(runs[0])


@pytest.mark.parametrize(
    "resources, says",
    [
        (CPU.replace(partition="gpus"), "no partition 'gpus'. Its partitions:\n  main: 2 nodes: 4 CPUs"),
        (CPU.replace(gres="gpu:3"), "Requested node configuration is not available"),
        (CPU.replace(gres="tpu:1"), "Invalid generic resource"),
        (CPU.replace(cpus=5), "configuration is not available. Its partitions:\n  main"),
        (CPU.replace(mem_gb=9), "Memory specification can not be satisfied"),
    ],
)
def test_what_the_cluster_cannot_give_is_refused_before_anything_runs(cluster, snapshot, tmp_path, resources, says):  # noqa: F811
    before = slurm("squeue", "--noheader")
    run = tiny(tmp_path, snapshot)
    with pytest.raises(ValueError) as refused:
        submit([run], snapshot.path, resources)
    assert says in str(refused.value)
    assert slurm("squeue", "--noheader") == before
    assert [p.name for p in run.iterdir()] == ["job.json"]


def test_a_job_whose_node_dies_runs_again(cluster, snapshot, tmp_path):  # noqa: F811
    run = tiny(tmp_path, snapshot, what="wait")
    (job,) = submit([run], snapshot.path, CPU)
    until(lambda: lives(run))
    node = lives(run)[0]["SLURMD_NODENAME"]
    slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    (state,) = wait([job], every=1)
    slurm("scontrol", "update", f"nodename={node}", "state=resume")
    assert state.word == "done" and len(lives(run)) == 2
    assert (job.end() or {})["code"] == 0
    no_kernel_of(run)


def test_a_job_that_slurm_has_forgotten_is_judged_by_its_folder(cluster, snapshot, tmp_path):  # noqa: F811
    run = tiny(tmp_path, snapshot)
    job = SlurmJob(run=run, id="999999", script=tmp_path / "x.sh", log=tmp_path / "x.err")
    (state,) = wait([job], progress=False, every=0.1)
    assert state.word == "failed" and "does not know the job any more" in state.reason
    (run / "slurm_end.json").write_text(json.dumps({"job": "999999", "code": 0, "reason": ""}))
    assert wait([job], progress=False)[0].word == "done"


def rows(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "_time"} for row in RunFolder(run).rows()]


def decomposition(folder: Path, snapshot: Snapshot, steps: int) -> Path:
    parameters = {"which": "tms_5-2", "steps": steps, "batch_size": 64}
    return Job(notebook="11_tms.ipynb", parameters=parameters, experiment="tms_5-2", code=str(snapshot.path)).write(
        folder
    )


def test_a_job_that_must_go_saves_and_comes_back_to_the_same_result(cluster, snapshot, tmp_path):  # noqa: F811
    job = Job(notebook="96_train.ipynb", parameters={"steps": 800}, code=str(snapshot.path))
    straight, stopped = job.write(tmp_path / "straight"), job.write(tmp_path / "stopped")
    jobs = submit([straight, stopped], snapshot.path, CPU)
    until(lambda: len(RunFolder(stopped).rows()) > 4)
    slurm("scancel", "--signal=USR2", jobs[1].id)
    until(lambda: job_state(stopped)["state"] == "interrupted")
    saved = RunFolder(stopped).load()[1]["step"]
    assert 0 < saved < 800
    assert [state.word for state in wait(jobs, every=1)] == ["done", "done"]
    assert "Restarts=1" in slurm("scontrol", "show", "job", jobs[1].id)

    assert not (straight / "provenance-1.json").exists() and (stopped / "provenance-1.json").exists()
    assert "KeyboardInterrupt" in (stopped / "notebook-1.ipynb").read_text()
    assert rows(stopped) == rows(straight) and rows(stopped)[-1]["_step"] == 800
    assert RunFolder(stopped).summary() == RunFolder(straight).summary()
    assert RunFolder(stopped).status()["state"] == "finished"
    recorded = read_json(stopped / "provenance.json")
    assert recorded["git"]["commit"] == snapshot.commit and recorded["environment"]["SLURM_ARRAY_TASK_ID"] == "1"


def test_a_sweep_with_agents_on_the_cluster(cluster, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("SPD_RUNS", str(tmp_path / "runs"))
    metric, points = {"name": "val/miracle_distance"}, {"seed": {"values": [0, 1]}}
    (tmp_path / "sweep.yaml").write_text(json.dumps({"method": "grid", "metric": metric, "parameters": points}))
    told = [
        "tms_5-2",
        "2",
        "--sweep_params_file",
        str(tmp_path / "sweep.yaml"),
        "-p",
        "steps",
        "20",
        "-p",
        "batch_size",
        "64",
    ]
    assert spd_sweep.main([*told, "--slurm", "--cpu", "--cpus", "1", "--mem_gb", "3", "--job_suffix", "two"]) == 0
    assert "2 jobs in SLURM's queue" in capsys.readouterr().out
    (sweep,) = (tmp_path / "runs" / "sweeps").iterdir()
    assert sweep.name.startswith("sweep-tms_5-2-two-")
    agents = [SlurmJob.of(folder) for folder in sorted((sweep / "agents").glob("[01]"))]
    assert [state.word for state in wait(agents, every=1)] == ["done", "done"]
    assert [(t["outcome"], t["point"]) for t in trial_records(sweep)] == [
        ("finished", {"seed": 0}),
        ("finished", {"seed": 1}),
    ]
    assert (sweep / "sweep_report.html").exists()  # the last agent wrote it
    commits = {read_json(Path(t["run"]) / "provenance.json")["git"]["commit"] for t in trial_records(sweep)}
    assert commits == {read_json(Path(str(Sweep.read(sweep).code)) / "snapshot.json")["commit"]}


def test_without_slurm_the_way_out_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    for main in (spd_run.main, spd_sweep.main, spd_evals.main):
        which = [] if main is spd_evals.main else ["tms_5-2"] if main is spd_run.main else ["tms_5-2", "1"]
        assert main([*which, "--slurm"]) == 2
        assert "this machine has no SLURM" in (said := capsys.readouterr().err) and "leave --slurm out" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_real_time_limit(cluster, snapshot, tmp_path):  # noqa: F811
    parameters = {"which": "tms_5-2", "steps": 6000}
    run = Job(notebook="11_tms.ipynb", parameters=parameters, code=str(snapshot.path)).write(tmp_path / "run")
    (job,) = submit([run], snapshot.path, CPU.replace(minutes=1))
    assert [state.word for state in wait([job])] == ["done"]
    assert len(list(run.glob("provenance-*.json"))) >= 1 and RunFolder(run).status()["state"] == "finished"
    steps = [row["_step"] for row in RunFolder(run).rows()]
    assert steps == sorted(set(steps)) and steps[-1] == 6000
    assert "this job is timed-out" in job.log.read_text()
