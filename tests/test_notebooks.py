"""The notebooks run from the first cell to the last, with few samples, and are kept with quiet outputs."""

import json
from pathlib import Path

import pytest

from .helpers.notebooks import FOLDER, execute


NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SHOWN = {"prune_and_ask": "GFLOPs", "fine_tune_under_pruning": "GFLOPs", "look_inside": "image/png"}


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == set(SHOWN)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_quiet_outputs(path):
    text = path.read_text("utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    for cell in cells:
        compile("".join(cell["source"]), path.name, "exec")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run `make notebooks`"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}, "a cell has written to stderr"
    assert not any(output["output_type"] == "error" for output in outputs)
    assert SHOWN[path.stem] in str(outputs) and str(Path.home()) not in text and len(text) < 600_000
    assert "pip" in "".join(cells[0]["source"]) and 'find_spec("madtp_hf") is None' in "".join(cells[0]["source"])


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    for package in ("nbformat", "nbclient", "ipykernel", "sklearn"):
        pytest.importorskip(package, reason="notebooks run in a kernel of Python, on digit scenes")
    book = execute(path, SAMPLES="64", STEPS="4", OMP_NUM_THREADS="1")
    assert SHOWN[path.stem] in str([output for cell in book.cells for output in cell.get("outputs", ())])
