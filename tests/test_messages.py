"""Messages are plain English: no phrase that a reader would have to translate, no option of a command in the library.

`python -m tests.helpers.list_messages` lists all messages, with file and line, to read them.
"""

import ast
import re

import pytest

from .helpers.list_messages import FILES, ROOT, messages, strings


SOURCE = ROOT / "src"
SOURCES = [file for file in FILES if file.is_relative_to(SOURCE)]

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


# Names that a message may start with although the file's code doesn't have them.
NAMES = {"bfloat16", "flat", "float32", "gelu", "madtp", "transformers"}
# Reasons that another message quotes, inside its own sentence.
REASONS = {
    "image path {} in tables of several folders: pass `image_dir`",
    "image path {} leads out of the image folder {}: expected one relative to it, without '..'",
    "label {}: expected 1 or true, 0 or false",
    "no {}",
    "the row has no image",
    "the row has no {}",
    "its classes are {}",
    "its labels are {}",
    "its columns are {}: expected {}",
    "its content has changed",
    "its outputs are {}",
    "its text file would lie outside of {}",
    "it has no settings or no source",
    "it has no tensor {}",
    "it is truncated or damaged at byte {}",
    "it redirects more than {} times",
    "the server answers {}",
    "the tokenizer answered {} captions with {}",
    "an empty file",
    "expected (height, width, 3) and uint8",
    "not an image, or of an unknown format",
    "weights_only: GLOBAL __setstate__",  # torch's own, which is looked for
    "skipped: no CUDA",  # cells of a benchmark's table
    "skipped: no torchao",
    "skipped: no varlen_attn",
    "{} doesn't accept the connection",
    "{} has no public address",
    "{} is not a directory",
    "{} is not an http(s) URL of a server, without a user",
    "{} of {} rows are kept",
    "{} vectors of {} images",
}


def collect() -> dict[tuple[str, int], str]:
    """Return {(file, line): text} of all strings of `src/`."""
    trees = {str(file.relative_to(SOURCE)): ast.parse(file.read_text()) for file in SOURCES}
    return {(name, line): text for name, tree in trees.items() for line, text in strings(tree)}


def is_prose(text: str) -> bool:
    return len(re.findall(r"[A-Za-z]{2,}", text)) > 2 and " " in text


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
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


def names_in(tree) -> set[str]:
    """Return what the code of a file calls things: its variables, arguments and attributes."""
    kinds = ("id", "arg", "attr", "name")
    return {
        getattr(node, kind) for node in ast.walk(tree) for kind in kinds if isinstance(getattr(node, kind, 0), str)
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_messages_are_sentences(file):
    """They start with a capital, a value or a name of the code, and end with a period or a value."""
    tree = ast.parse(file.read_text())
    names, wrong = names_in(tree) | NAMES, []
    for message in messages(tree):
        text = " ".join(message.text.split())
        if message.kind in ("error", "warning", "help") and message.is_whole and text not in REASONS:
            first = re.match(r"[a-z]\w*", text)
            if first and first[0] not in names and "_" not in first[0]:
                wrong.append(f"line {message.line}: {text!r} starts in lower case")
            if not re.search(r"[.?}]$", text) and " " in text:
                wrong.append(f"line {message.line}: {text!r} has no period at its end")
    assert not wrong, "\n".join(wrong)


def test_the_library_names_no_option_of_a_command():
    found = collect()
    wrong = [
        f"{file}, line {line}: {text}"
        for (file, line), text in found.items()
        if file.startswith("madtp_hf/") and is_prose(text) and re.search(r"(?<![\w(<-])--[a-z][\w-]+", text)
    ]
    assert not wrong, "\n".join(wrong)


def test_commands_name_no_python_argument():
    found = collect()
    wrong = [
        f"{file}, line {line}: {text}"
        for (file, line), text in found.items()
        if file.startswith("madtp_hf_cli/") and is_prose(text) and re.search(r"\b[a-z]\w*_\w+=|=(True|False)\b", text)
    ]
    assert not wrong, "\n".join(wrong)
