"""The house rules as functions. Each takes a folder or a list of files and returns the violations as lines of text."""

import ast
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager
from papermill import inspect_notebook

REPO = Path(__file__).resolve().parent.parent

API_KEYS = re.compile(
    r"""(?<![A-Za-z0-9])(?:
        [0-9a-f]{40}                 # Weights & Biases
      | local-[0-9a-f]{40}           # Weights & Biases, self-hosted
      | wandb_v1_[A-Za-z0-9_]{20,}   # Weights & Biases, since 2025
      | sk-[A-Za-z0-9_-]{20,}        # OpenAI, Anthropic
      | hf_[A-Za-z0-9]{20,}          # Hugging Face
      | gh[pousr]_[A-Za-z0-9]{20,}   # GitHub
      | AKIA[0-9A-Z]{16}             # AWS
    )(?![A-Za-z0-9])""",
    re.VERBOSE,
)
MACHINE_PATHS = re.compile(r"/(?:work|root)/")
MAX_OUTPUT_BYTES = 1_000_000


# Notebooks


def notebooks(nbs: Path) -> list[Path]:
    return sorted(nb for nb in nbs.rglob("*.ipynb") if not any(part[0] in "._" for part in nb.relative_to(nbs).parts))


def number(nb: Path) -> int | None:
    """The number its name starts with; a name without one (index) stands above all numbers."""
    found = re.match(r"\d+", nb.name)
    return int(found[0]) if found else None


def label(nb: Path) -> str | None:
    """Its number with a letter, if it has one: 08 < 08b < 08c < 09."""
    found = re.match(r"\d+[a-z]?(?=_)", nb.name)
    return found[0] if found else None


def read_cells(nb: Path) -> list[dict]:
    cells = json.loads(nb.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in cells]


def code_cells(nb: Path) -> list[str]:
    return [cell["source"] for cell in read_cells(nb) if cell["cell_type"] == "code"]


def repeated_numbers(nbs: Path) -> list[str]:
    counts = Counter(label(nb) for nb in notebooks(nbs))
    return [f"{n} notebooks have the number {num}" for num, n in counts.items() if num is not None and n > 1]


def parameter_cells(nbs: Path) -> list[str]:
    """A run notebook (10 and above, but for the jobs' own floor, 2x) has exactly one `parameters` cell, others at most one."""
    bad = []
    for nb in notebooks(nbs):
        n = sum("parameters" in cell["metadata"].get("tags", []) for cell in read_cells(nb))
        floor = (number(nb) or 0) // 10
        if n > 1 or (n == 0 and floor not in (0, 2)):
            bad.append(f"{nb.name}: {n} cells are tagged parameters")
        elif n == 1:
            (cell,) = [cell for cell in read_cells(nb) if "parameters" in cell["metadata"].get("tags", [])]
            names = [
                ast.unparse(t) for a in ast.parse(cell["source"]).body if isinstance(a, ast.Assign) for t in a.targets
            ]
            unseen = set(names) - set(inspect_notebook(str(nb)))  # by papermill: it warns of those that are given
            bad += [
                f"{nb.name}: papermill cannot read the line of {name} (a second = in it?)" for name in sorted(unseen)
            ]
    return bad


def missing_kernels(nbs: Path) -> list[str]:
    """papermill starts only a notebook that names its kernel; .venv's is called python3."""
    kernels = {
        nb.name: json.loads(nb.read_text(encoding="utf-8"))["metadata"].get("kernelspec") for nb in notebooks(nbs)
    }
    return [f"{name}: its kernel is not python3" for name, k in kernels.items() if not k or k["name"] != "python3"]


def heavy_outputs(nbs: Path) -> list[str]:
    sizes = {nb.name: len(outputs(nb).encode()) for nb in notebooks(nbs)}
    return [f"{name}: {size} bytes of outputs" for name, size in sizes.items() if size >= MAX_OUTPUT_BYTES]


def machine_paths(nbs: Path) -> list[str]:
    found = {nb.name: MACHINE_PATHS.search(outputs(nb)) for nb in notebooks(nbs)}
    return [f"{name}: an output names a path of this machine, {m[0]}…" for name, m in found.items() if m]


def outputs(nb: Path) -> str:
    return json.dumps([cell["outputs"] for cell in read_cells(nb) if cell.get("outputs")])


# Imports


def upward_imports(nbs: Path, lib: str = "spd") -> list[str]:
    """A notebook imports only modules exported by notebooks of lower numbers (or its own)."""
    owners = {mod: nb for nb in notebooks(nbs) for mod in default_exports(nb, lib)}
    bad = []
    for nb in notebooks(nbs):
        for mod in sorted(imported_modules(nb, lib)):
            owner = next((owners[p] for p in prefixes(mod) if p in owners), None)
            if owner and rank(owner) > rank(nb):
                bad.append(f"{nb.name} imports {mod}, which {owner.name} exports")
    return bad


def rank(nb: Path) -> str:
    return label(nb) or "~"  # above all numbers


def default_exports(nb: Path, lib: str) -> list[str]:
    directives = re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join(code_cells(nb)), re.MULTILINE)
    return [f"{lib}.{name}" for name in directives]


def imported_modules(nb: Path, lib: str) -> set[str]:
    """Dotted names imported from `lib`; `from a import b` counts as a.b, which may be a module."""
    names = set()
    for source in code_cells(nb):
        for node in ast.walk(ast.parse(plain_python(source), filename=nb.name)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith(f"{lib}.")}


def plain_python(source: str) -> str:
    """A cell's source with IPython's %, ! and ? syntax turned into calls."""
    first, _, rest = source.lstrip().partition("\n")
    if first.startswith("%%"):
        source = rest if first[2:].split()[0] in ("time", "timeit", "capture", "prun") else ""
    return TransformerManager().transform_cell(source)


def prefixes(module: str) -> list[str]:
    """`a.b.c` -> [`a.b.c`, `a.b`, `a`]"""
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]


# Secrets


def secrets(files: Iterable[Path]) -> list[str]:
    bad = []
    for file in files:
        for i, line in enumerate(file.read_text(encoding="utf-8", errors="ignore").splitlines(), 1):
            unescaped = re.sub(r"\\[a-z]", " ", line)  # a notebook's JSON holds \n, \t
            bad += [f"{file}:{i}: looks like an API key: {m[:4]}…" for m in API_KEYS.findall(unescaped)]
    return bad


def repo_files(repo: Path = REPO) -> list[Path]:
    """Files git tracks or would add; without git, all but hidden and built ones."""
    git = ["git", "-C", str(repo), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (repo / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(git, capture_output=True, check=True, text=True).stdout.split("\0")
        files = {repo / name for name in listed if name}
    else:
        files = set()
        for folder, subfolders, names in os.walk(repo):
            subfolders[:] = [s for s in subfolders if s[0] not in "._" and s not in ("nbs_py", "runs", "wandb")]
            files |= {Path(folder) / name for name in names}
    return sorted(file for file in files if file.is_file())


# Generated files


def copy_repo(to: Path, repo: Path = REPO) -> Path:
    for file in repo_files(repo):
        target = to / file.relative_to(repo)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target, follow_symlinks=False)
    return to


def run_python(code: str, cwd: Path) -> None:
    """Run `code` in a fresh Python in `cwd`, so that nbdev finds the settings.ini there."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def stale_exports(copy: Path) -> list[str]:
    """Regenerate spd/ in a copy of the repo and compare, both ways."""
    kept = copy / "spd_before"
    (copy / "spd").rename(kept)
    run_python("from nbdev.doclinks import nbdev_export as f; f.__wrapped__()", copy)
    return different_files(kept, copy / "spd")


def unclean_notebooks(copy: Path) -> list[str]:
    """Run nbdev_clean in a copy of the repo and compare."""
    before = {nb: nb.read_bytes() for nb in notebooks(copy / "nbs")}
    run_python("from nbdev.clean import nbdev_clean as f; f.__wrapped__()", copy)
    return [f"{nb.name} is not clean: run nbdev_clean" for nb, old in before.items() if nb.read_bytes() != old]


def different_files(committed: Path, generated: Path) -> list[str]:
    bad = []
    for file in sorted(files_in(committed) | files_in(generated)):
        old, new = committed / file, generated / file
        if not new.exists():
            bad.append(f"{file}: no notebook generates it")
        elif not old.exists():
            bad.append(f"{file}: missing, run nbdev_export")
        elif not filecmp.cmp(old, new, shallow=False):
            bad.append(f"{file}: differs from its notebook, run nbdev_export or nbdev_update")
    return bad


def files_in(folder: Path) -> set[Path]:
    return {f.relative_to(folder) for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts}
