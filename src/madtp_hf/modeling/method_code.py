"""Carries a pruning method of one's own in a checkpoint: its file is copied beside the modeling files."""

import inspect
import re
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files


# In a checkpoint, the files of `madtp_hf.modeling` are siblings.
_IMPORT = re.compile(r"^(\s*from )madtp_hf\.modeling(\.\w+ import )", re.MULTILINE)
_OTHER_IMPORT = re.compile(r"^\s*(?:from|import) madtp_hf\b.*$", re.MULTILINE)


def is_own(method: type) -> bool:
    """Return whether a method is one's own, in a file that the modeling files do not import."""
    return method.__module__.rpartition(".")[0] != __name__.rpartition(".")[0]


def carry_code(method: type, folder: Path, modeling_file: str) -> None:
    """Copy the file that defines a method to a checkpoint's folder, and import it in the folder's modeling file.

    Raises:
        ValueError: if the method is not defined in a file, or the file imports more of madtp_hf than a checkpoint has.
    """
    try:
        source = None if method.__module__ == "__main__" else inspect.getsourcefile(method)
    except (OSError, TypeError):
        source = None
    if source is None:
        raise ValueError(
            f"The pruning method {method.name!r} is defined in {method.__module__}, so a checkpoint can't carry it:"
            " move the class to a file of its own and import it from there."
        )
    for file in (Path(source), *map(Path, get_relative_import_files(source))):
        code = _IMPORT.sub(r"\1\2", file.read_text())
        other = _OTHER_IMPORT.search(code)
        if other is not None:
            raise ValueError(
                f"{file} has the line {other.group().strip()!r}, and checkpoints are used without madtp_hf: expected"
                " imports from madtp_hf.modeling alone, as `from madtp_hf.modeling.pruning_method import Decision`."
            )
        target = folder / file.name
        if target.exists() and target.read_text() != code and not _is_copy(target, method):
            raise ValueError(f"{file} has the name of a file of the checkpoint's own: rename it.")
        target.write_text(code)
    line = f"from .{Path(source).stem} import {method.__name__}  # noqa: F401 (the pruning method)\n"
    modeling = folder / modeling_file
    text = modeling.read_text()
    if line not in text:
        modeling.write_text(text.rstrip("\n") + "\n\n" + line)


def _is_copy(target: Path, method: type) -> bool:
    """Return whether a file is an older copy of the one that defines the method."""
    return f"class {method.__name__}(" in target.read_text()
