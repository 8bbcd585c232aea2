"""The notebooks run from the first cell to the last, with few samples, and are kept without outputs."""

import json
import os
from pathlib import Path

import pytest


NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples" / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["fine_tune_under_pruning", "look_inside", "prune_and_ask"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs_and_its_code_compiles(path):
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    for cell in cells:
        assert cell["outputs"] == [] and cell["execution_count"] is None
        compile("".join(cell["source"]), path.name, "exec")
    assert "pip" in "".join(cells[0]["source"]) and 'find_spec("madtp_hf") is None' in "".join(cells[0]["source"])


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="notebooks are run with nbclient")
    nbclient = pytest.importorskip("nbclient", reason="notebooks are run with nbclient")
    pytest.importorskip("ipykernel", reason="notebooks are run in a kernel of Python")
    pytest.importorskip("sklearn", reason="the digit scenes need scikit-learn")
    for name, value in {"SAMPLES": "64", "STEPS": "4", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    source = Path(__file__).parent.parent / "src"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")]))
    book = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        book, timeout=280, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    client.execute()  # raises what a cell raises
    printed = [
        output.get("text", "") or str(output.get("data", ""))
        for cell in book.cells
        for output in cell.get("outputs", ())
    ]
    shown = {"prune_and_ask": "GFLOPs", "fine_tune_under_pruning": "GFLOPs", "look_inside": "image/png"}[path.stem]
    assert any(shown in text for text in printed)
