"""List every text that a user of the package, its scripts or its benchmarks can meet outside the documentation.

`python -m tests.helpers.list_messages` prints them by kind, with file and line, to be read by a person.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("src", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
KINDS = {
    "warning": {"warn", "warning", "warning_once", "info", "error"},
    "progress": {"tqdm", "trange", "set_description"},
    "shown": {"echo", "print", "write", "fail", "BadParameter", "exit"},
}
HELP = {"help", "description", "epilog"}  # of options, arguments, parsers and fields of dataclasses


class Message(NamedTuple):
    kind: str  # error, warning, progress, shown or help
    line: int
    text: str  # with {} for values
    is_whole: bool  # all that is raised, warned or shown as help; False for a part of it


def joined(node) -> str | None:
    """The text of a string, of an f-string, with {} for values, or of a sum of these; None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(joined(part) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [joined(node.left), joined(node.right)]
        return None if parts == [None, None] else "".join(part or "{}" for part in parts)
    return None


def strings(node) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each string in a syntax tree, the parts of an f-string or a sum as one; no docstrings."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        text = joined(child)
        if text is not None:
            yield child.lineno, text
        # The values of an f-string can hold strings of their own.
        inner = [part.value for part in ast.walk(child) if isinstance(part, ast.FormattedValue)] if text else [child]
        for other in inner:
            yield from strings(other)


def name_of(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _found(kind: str, node, whole=None) -> Iterator[Message]:
    yield from (Message(kind, line, text, text == whole) for line, text in strings(ast.Expression(node)))


def messages(tree) -> Iterator[Message]:
    """Yield the strings of a syntax tree that are raised, warned, logged, printed, or shown as progress or help."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from _found("error", node.exc, joined(node.exc.args[0]) if node.exc.args else None)
        elif isinstance(node, ast.Call):
            for kind, names in KINDS.items():
                if name_of(node) in names:
                    yield from _found(kind, node, joined(node.args[0]) if node.args else None)
            for word in node.keywords:
                if word.arg in HELP:
                    yield from _found("help", word.value, joined(word.value))
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values):
                if key is not None and joined(key) == "help":
                    yield from _found("help", value, joined(value))


if __name__ == "__main__":
    for file in FILES:
        for message in sorted(set(messages(ast.parse(file.read_text()))), key=lambda message: message.line):
            if " " in message.text.strip():
                name, text = file.relative_to(ROOT), " ".join(message.text.split())
                print(f"{message.kind:8} {name}:{message.line}: {text}{'' if message.is_whole else '  [part]'}")
