"""README.md is the index notebook, as a page."""

import json
import re
from pathlib import Path

REPO = Path(__file__).parent.parent


def as_page(notebook: Path) -> str:
    """The markdown cells of a notebook, with its relative links made relative to the top of the repository."""
    cells = json.loads(notebook.read_text())["cells"]
    text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.sub(r"\]\((images/|\d\d[a-z]?_)", r"](nbs/\1", text) + "\n"


def test_readme_is_the_index():
    assert (REPO / "README.md").read_text() == as_page(REPO / "nbs" / "index.ipynb")


def test_every_chapter_is_on_the_map():
    chapters = {p.name for p in (REPO / "nbs").glob("[0-9]*.ipynb")}
    assert chapters == set(re.findall(r"\]\(nbs/(\d\d[a-z]?_\w+\.ipynb)\)", (REPO / "README.md").read_text()))
