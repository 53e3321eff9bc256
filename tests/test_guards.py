"""The repo keeps the house rules, and each rule catches a planted violation."""

import json
from pathlib import Path

import guards
import pytest

NBS = guards.REPO / "nbs"
ROOT, WORK = "/" + "root", "/" + "work"  # in parts: no file here names a path of a machine


def write_nb(folder: Path, name: str, *sources: str, tags=(), outputs=()) -> Path:
    """A clean notebook with one code cell per source; `tags` and `outputs` go to each of them."""
    cells = [
        dict(cell_type="code", execution_count=None, id=f"{i:08x}", metadata={"tags": list(tags)} if tags else {})
        | dict(outputs=list(outputs), source=source.splitlines(keepends=True))
        for i, source in enumerate(sources)
    ]
    kernel = dict(display_name="python3", language="python", name="python3")
    nb = dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(nb, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


def stream(text: str) -> dict:
    return dict(output_type="stream", name="stdout", text=[text])


# The repo


@pytest.mark.parametrize(
    "guard",
    [
        guards.repeated_numbers,
        guards.parameter_cells,
        guards.missing_kernels,
        guards.upward_imports,
        guards.heavy_outputs,
        guards.machine_paths,
    ],
)
def test_notebooks_keep(guard):
    assert guards.notebooks(NBS)
    assert guard(NBS) == []


def test_no_api_keys():
    assert guards.secrets(guards.repo_files()) == []


def test_spd_is_what_the_notebooks_generate(tmp_path):
    assert guards.stale_exports(guards.copy_repo(tmp_path)) == []


def test_notebooks_are_clean(tmp_path):
    assert guards.unclean_notebooks(guards.copy_repo(tmp_path)) == []


# Planted violations


def test_catches_repeated_numbers(tmp_path):
    write_nb(tmp_path, "03_a.ipynb", "")
    write_nb(tmp_path, "index.ipynb", "")
    write_nb(tmp_path, "about.ipynb", "")
    assert guards.repeated_numbers(tmp_path) == []
    write_nb(tmp_path, "03_b.ipynb", "")
    assert guards.repeated_numbers(tmp_path) == ["2 notebooks have the number 03"]


def test_catches_parameter_cells(tmp_path):
    write_nb(tmp_path, "00_none.ipynb", "a = 1")
    write_nb(tmp_path, "09_one.ipynb", "a = 1", tags=["parameters"])
    write_nb(tmp_path, "10_one.ipynb", "a = 1", tags=["parameters"])
    write_nb(tmp_path, "index.ipynb", "a = 1")
    assert guards.parameter_cells(tmp_path) == []
    write_nb(tmp_path, "08_two.ipynb", "a = 1", "b = 1", tags=["parameters"])
    write_nb(tmp_path, "11_none.ipynb", "a = 1")
    write_nb(tmp_path, "12_two.ipynb", "a = 1", "b = 1", tags=["parameters"])
    write_nb(tmp_path, "13_one.ipynb", "a = 1  # 0 = none\nb = 2", tags=["parameters"])
    assert [line[:2] for line in guards.parameter_cells(tmp_path)] == ["08", "11", "12", "13"]


def test_catches_missing_kernels(tmp_path):
    nb = write_nb(tmp_path, "10_a.ipynb", "")
    assert guards.missing_kernels(tmp_path) == []
    for metadata in ({}, {"kernelspec": {"name": "my-env"}}):
        nb.write_text(json.dumps(json.loads(nb.read_text()) | {"metadata": metadata}))
        assert len(guards.missing_kernels(tmp_path)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from spd.top import x",
        "from spd.top import *",
        "from spd import low, top",
        "import spd.top as t",
        "from spd.experiments.toy import x",
        "from spd.experiments import toy",
        "#| export\ndef f():\n    from spd.top import x",
        "%matplotlib inline\n!ls\nfrom spd.top import x",
        "%%time\nfrom spd.top import x",
        "files = !ls\n%time import spd.low\nif True:\n    %time pass\n    import spd.top",
        "from spd.door import x",
    ],
)
def test_catches_upward_imports(tmp_path, source):
    write_nb(tmp_path, "00_low.ipynb", "#| default_exp low")
    write_nb(tmp_path, "02_top.ipynb", "#| default_exp top", "from spd.top import x")
    write_nb(tmp_path, "10_toy.ipynb", "#| default_exp experiments.toy", "from spd.low import *\nfrom spd import top")
    write_nb(tmp_path, "index.ipynb", "#| default_exp door", "from spd.experiments.toy import x")
    assert guards.upward_imports(tmp_path) == []
    write_nb(tmp_path, "01_mid.ipynb", "#| default_exp mid", "import torch\nfrom spd.low import x", source)
    (found,) = guards.upward_imports(tmp_path)
    assert found.startswith("01_mid.ipynb imports spd.")


@pytest.mark.parametrize("source", ["%%bash\nfrom spd.top import x", "# import spd.top", "import spdx.top"])
def test_other_text_is_no_import(tmp_path, source):
    write_nb(tmp_path, "02_top.ipynb", "#| default_exp top")
    write_nb(tmp_path, "01_mid.ipynb", source)
    assert guards.upward_imports(tmp_path) == []


def test_catches_heavy_outputs(tmp_path):
    write_nb(tmp_path, "00_a.ipynb", "1", outputs=[stream("x" * 900_000)])
    assert guards.heavy_outputs(tmp_path) == []
    write_nb(tmp_path, "00_a.ipynb", "1", "2", outputs=[stream("x" * 500_000)])
    assert len(guards.heavy_outputs(tmp_path)) == 1


@pytest.mark.parametrize("text, bad", [(f"saved\n{ROOT}/x.png", 1), (f"'{WORK}/main'", 1), ("work/a /worker/", 0)])
def test_catches_machine_paths(tmp_path, text, bad):
    write_nb(tmp_path, "00_a.ipynb", f"'{ROOT}/in/source'", outputs=[stream(text)])
    assert len(guards.machine_paths(tmp_path)) == bad


@pytest.mark.parametrize(
    "key",
    [
        "0a1b" * 10,
        "local-" + "0a1b" * 10,
        "wandb_v1_" + "Ab1" * 20,
        "sk-" + "Ab1" * 12,
        "sk-ant-" + "Ab1" * 12,
        "hf_" + "Ab1" * 11,
        "ghp_" + "Ab1" * 12,
        "AKIA" + "AB12" * 4,
    ],
)
def test_catches_api_keys(tmp_path, key):
    file = tmp_path / "notes.md"
    file.write_text(f"WANDB_API_KEY=\nrisk-free, sha256 {'0a1b' * 16}, commit {'0a1b' * 3}\n")
    assert guards.secrets([file]) == []
    file.write_text(f'first line\n"key:\\n{key}"\n')
    (found,) = guards.secrets([file])
    assert f"{file}:2" in found and key not in found


@pytest.mark.parametrize("git", [True, False])
def test_the_key_search_sees_new_files(tmp_path, git):
    if git:
        guards.subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for name in (".gitignore", "spd/new.py", ".venv/big.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(".venv/\n")
    names = {str(f.relative_to(tmp_path)) for f in guards.repo_files(tmp_path)}
    assert names == {".gitignore", "spd/new.py"}


@pytest.fixture
def tiny_repo(tmp_path) -> Path:
    """A repo of one notebook, exported and clean."""
    (tmp_path / "settings.ini").write_bytes((guards.REPO / "settings.ini").read_bytes())
    write_nb(tmp_path / "nbs", "00_a.ipynb", "#| default_exp a", "#| export\nx = 1")
    guards.run_python("from nbdev.doclinks import nbdev_export as f; f.__wrapped__()", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "plant, found",
    [
        (lambda repo: None, []),
        (lambda repo: (repo / "spd/a.py").write_text("x = 2"), ["a.py: differs"]),
        (lambda repo: (repo / "spd/old.py").write_text("x = 1"), ["old.py: no notebook"]),
        (lambda repo: (repo / "spd/a.py").unlink(), ["a.py: missing"]),
        (
            lambda repo: write_nb(repo / "nbs", "01_b.ipynb", "#| default_exp b", "#| export\nx = 1"),
            ["_modidx.py: differs", "b.py: missing"],
        ),
    ],
)
def test_catches_stale_exports(tiny_repo, plant, found):
    plant(tiny_repo)
    lines = guards.stale_exports(tiny_repo)
    assert len(lines) == len(found) and all(line.startswith(start) for line, start in zip(lines, found, strict=True))


def test_catches_unclean_notebooks(tiny_repo):
    write_nb(tiny_repo / "nbs", "01_b.ipynb", "a = 1", tags=["parameters"], outputs=[stream("kept")])
    assert guards.unclean_notebooks(tiny_repo) == []
    nb = tiny_repo / "nbs/01_b.ipynb"
    nb.write_text(nb.read_text().replace('"execution_count": null', '"execution_count": 3'))
    assert guards.unclean_notebooks(tiny_repo) == ["01_b.ipynb is not clean: run nbdev_clean"]
