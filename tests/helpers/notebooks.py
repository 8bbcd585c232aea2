"""Run the notebooks of examples/notebooks and keep their outputs: `make notebooks`, or

python -m tests.helpers.notebooks [NAME ...]

Progress bars and warnings are left out, so that a reader sees what the cells print and draw.
"""

import os
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "notebooks"
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


def execute(path: Path, **environment: str):
    """Return the notebook (`nbformat`) after a run of all its cells in a new kernel; raises what a cell raises."""
    import nbclient
    import nbformat

    before = dict(os.environ)
    os.environ |= {
        **QUIET,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), before.get("PYTHONPATH", "")]),
        **environment,
    }
    try:
        book = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": str(path.parent)}}
        nbclient.NotebookClient(book, timeout=1200, kernel_name="python3", resources=resources).execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return book


def keep_outputs(path: Path) -> None:
    """Run the notebook and write it with what its cells print and draw."""
    import nbformat

    book = execute(path)
    book.metadata.language_info = {"name": "python"}  # not this machine's version
    for cell in book.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:  # a picture once, as PNG
                output.get("data", {}).pop("image/jpeg", None)
    nbformat.write(book, path)


if __name__ == "__main__":
    for name in sys.argv[1:] or [path.stem for path in sorted(FOLDER.glob("*.ipynb"))]:
        keep_outputs(FOLDER / f"{name}.ipynb")
        print(name, flush=True)
