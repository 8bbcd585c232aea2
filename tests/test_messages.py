"""Messages are plain English: no phrase that a reader would have to translate, no option of a command in the library.

`python -m tests.test_messages` lists all messages of `src/`, with file and line, to read them.
"""

import ast
import re
from pathlib import Path

import pytest


SOURCE = Path(__file__).parents[1] / "src"
FILES = sorted(SOURCE.rglob("*.py"))
# Calls whose strings a user sees, beside `raise`.
CALLS = {"warn", "warning", "warning_once", "info", "error", "echo", "print", "tqdm", "Option", "Argument", "Typer"}
CALLS |= {"BadParameter", "fail", "write"}

# Phrases of STYLE's table and their kin, with what to write instead.
BAD_PHRASES = {
    r"(?<![Tt]here )\bis no (?!longer\b|more\b)[a-z]\w*": "is not a ...",
    r"(?<![Tt]here )\bis none\b": "is not one",
    r"\bto nowhere\b": "broken symlink",
    r"\bso many\b": "this many",
    r"\b(go|goes|went|going|gone) on\b": "continue, resume",
    r"\bsay with\b": "pass ...",
    r"\bneediest\b": "the largest count",
    r"\bbegun with\b": "started with",
    r"\bexpected (one|a row|two images) an? \w+": "one per ...",
    r"\b(row|path|file|images|object|answer|caption|one|line) a"
    r" (sample|row|text|line|image|budget|file|query|question)\b": "per",
    r"\b(go|goes|do|does) without\b": "without it, ...",
    r"\bwhich (the|this) \w+ has not\b": "which the ... does not have",
    r"\bmomentum twin\b": "momentum (EMA) encoder",
    r"\b(is|are) not there\b": "does not exist",
    r"\b(is|are) there already\b|\bup already\b": "exists, is uploaded",
    r"\banew\b": "again, from scratch",
    r"\bmend\b": "fix",
    r"\bbroke off\b|\bbroken off\b": "was interrupted",
    r"\bof no use\b": "has no effect",
    r"\bcut short\b": "truncated",
    r"\btake\w* (it|them|the file) away\b": "remove",
}


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


def strings(node):
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


def messages(tree):
    """Yield (line, text) of each string that is raised, warned, logged, printed, or shown in `--help`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and name_of(node) in CALLS):
            yield from strings(node)


def collect():
    """Return {(file, line): text} of all strings of `src/`, and the keys of those that are messages."""
    found, shown = {}, set()
    for file in FILES:
        tree, name = ast.parse(file.read_text()), str(file.relative_to(SOURCE))
        found |= {(name, line): text for line, text in strings(tree)}
        shown |= {(name, line) for line, _ in messages(tree)}
    return found, shown


def is_prose(text: str) -> bool:
    return len(re.findall(r"[A-Za-z]{2,}", text)) > 2 and " " in text


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_messages_and_docstrings_have_no_phrase_to_translate(file):
    tree = ast.parse(file.read_text())
    found = list(strings(tree))
    found += [(node.lineno, node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    wrong = {
        f"line {line}: {match[0]!r}: write {better!r}"
        for line, text in found
        if isinstance(text, str)
        for phrase, better in BAD_PHRASES.items()
        for match in [re.search(phrase, " ".join(text.split()))]
        if match
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_the_library_names_no_option_of_a_command():
    found, _ = collect()
    wrong = [
        f"{file}, line {line}: {text}"
        for (file, line), text in found.items()
        if file.startswith("madtp_hf/") and is_prose(text) and re.search(r"(?<![\w(<-])--[a-z][\w-]+", text)
    ]
    assert not wrong, "\n".join(wrong)


def test_commands_name_no_python_argument():
    found, _ = collect()
    wrong = [
        f"{file}, line {line}: {text}"
        for (file, line), text in found.items()
        if file.startswith("madtp_hf_cli/") and is_prose(text) and re.search(r"\b[a-z]\w*_\w+=|=(True|False)\b", text)
    ]
    assert not wrong, "\n".join(wrong)


if __name__ == "__main__":
    for (file, line), text in sorted(collect()[0].items()):
        if is_prose(text):
            print(f"{file}:{line}: {' '.join(text.split())}")
