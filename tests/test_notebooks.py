"""The notebooks run from top to bottom, and their outputs are committed."""

import itertools
import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # of the kernel's own machinery
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_holds_its_outputs(path):
    committed = nbformat.read(path, as_version=4)
    run = nbformat.from_dict(committed)
    nbclient.NotebookClient(run, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell, fresh in zip(committed.cells, run.cells, strict=True):
        outputs = ([output.output_type for output in c.get("outputs", [])] for c in (cell, fresh))
        kinds = [[kind for kind, _ in itertools.groupby(found)] for found in outputs]  # a stream may come in pieces
        assert kinds[0] == kinds[1], cell.source
    assert any(cell.get("outputs") for cell in committed.cells)
