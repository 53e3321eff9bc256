"""Every notebook goes through nbdev's docs processing: the step before Quarto, which runs imports and show_doc."""

from guards import REPO, copy_repo, notebooks, read_cells, run_python


def test_notebooks_become_docs(tmp_path):
    repo = copy_repo(tmp_path)
    run_python("from nbdev.serve import proc_nbs; proc_nbs(n_workers=0, force=True)", repo)
    processed = {nb.name: nb for nb in notebooks(repo / "_proc")}
    assert set(processed) == {nb.name for nb in notebooks(REPO / "nbs")}
    errors = {
        name: [o for c in read_cells(nb) for o in c.get("outputs", []) if o["output_type"] == "error"]
        for name, nb in processed.items()
    }
    assert not {name: found for name, found in errors.items() if found}
