"""Run the code of a documentation page from its top, as a reader who pastes it does."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"(?:<!-- (not run|file): ([^\n]+?) -->\n)?^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    code: str
    not_run: str | None  # the reason
    file: str | None  # the name under which the page tells the reader to save it


def blocks_of(page: Path) -> list[Block]:
    """Return a page's fenced blocks; an HTML comment before one says why it is not run, or which file it is."""
    return [
        Block(language, code, name if kind == "not run" else None, name if kind == "file" else None)
        for kind, name, language, code in _BLOCK.findall(page.read_text())
    ]


def run_page(page: Path, folder: Path) -> dict:
    """Write a page's files into a folder, run its Python blocks in order, and return the names that they define.

    The working directory must be the folder.
    """
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(ROOT / "examples")
    names = {"__name__": "page"}
    for number, block in enumerate(blocks_of(page), 1):
        if block.file:
            (folder / block.file).write_text(block.code)
        elif block.language == "python" and not block.not_run:
            exec(compile(block.code, f"{page.name}, block {number}", "exec"), names)
    return names


def commands_of(page: Path) -> list[tuple[list[str], bool]]:
    """Return the words of each command of a page, and whether it is complete: text names commands in part."""
    text = page.read_text()
    shell = [block.code.replace("\\\n", " ") for block in blocks_of(page) if block.language == "bash"]
    lines = [(line, True) for code in shell for line in code.splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [(line, False) for line in re.findall(r"`((?:madtp-hf|python) [^`]+)`", prose)]
    commands = [(shlex.split(" ".join(line.split()), comments=True), complete) for line, complete in lines]
    return [(words, complete) for words, complete in commands if words]
