"""The columns of rows: their names in data of all kinds, those of each task, and how their values are read."""

import json
from collections.abc import Iterable


# Each column and the names that it has in tables; the first name that a table has is used.
ALIASES = {
    "image": ("image", "file_name", "image_path", "path", "file", "img", "jpg", "png"),
    "left_image": ("left_image", "left"),
    "right_image": ("right_image", "right"),
    "question": ("question", "text", "prompt"),
    "answers": ("answers", "answer"),
    "sentence": ("sentence", "statement", "text"),
    "label": ("label",),
    "captions": ("captions", "caption", "text"),
    "image_id": ("image_id",),
    "key": ("key", "id", "question_id", "image_id", "__key__"),
}
IMAGES = ("image", "left_image", "right_image")
TEXTS = ("question", "sentence", "captions")
# The columns of each task; * marks those that may be missing.
TASK_COLUMNS = {
    "vqa": ("image", "question", "answers*"),
    "captioning": ("image", "captions"),
    "retrieval": ("image", "captions", "image_id*"),
    "clip": ("image", "captions", "image_id*"),
    "nlvr2": ("left_image", "right_image", "sentence", "label*"),
}
_LABELS = {"1": 1, "true": 1, "0": 0, "false": 0}


def match_columns(found: Iterable[str], wanted: Iterable[str], given: dict[str, str] | None, shown) -> dict[str, str]:
    """Return the mapping from the columns wanted to a table's names; those that it lacks are left out.

    given: the table's names of some columns, as the caller says. Raises a `ValueError` if they aren't there, or if
    there is no image.
    """
    found, wanted, given = list(found), list(wanted), {k: v for k, v in (given or {}).items() if v is not None}
    if unknown := [name for name in given if name not in wanted]:
        raise ValueError(f"{', '.join(unknown)} can't be chosen: expected columns out of {', '.join(wanted)}.")
    matched = {}
    for name in wanted:
        names = (given[name],) if name in given else ALIASES.get(name, (name,))
        match = next((one for one in names if one in found), None)
        if match is not None:
            matched[name] = match
        elif name in given or name in IMAGES or name not in ALIASES:
            raise missing_column(shown, names, name, found)
    return matched


def missing_column(shown, names, name: str, found: Iterable[str]) -> ValueError:
    return ValueError(
        f"{shown} has no column {' or '.join(names)}: it has {', '.join(map(str, found)) or 'none'};"
        f' pass columns={{"{name}": NAME}}.'
    )


def read_value(name: str, value):
    """Return a value as the collators take it, None if it is missing; a `ValueError` says what is wrong."""
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return None
    if name in ("answers", "captions"):
        return _read_list(name, value)
    if name == "label":
        label = _LABELS.get(str(value).strip().lower())
        if label is None:
            raise ValueError(f"label {value!r}: expected 1 or true, 0 or false")
        return label
    if name in ("image_id", "key"):
        return clean(str(value))
    if name in TEXTS and not isinstance(value, str):
        raise ValueError(f"{name}: expected a string, got {repr(value)[:60]}")
    return value


def _read_list(name: str, value) -> list[str]:
    """Read strings from a list, a JSON list in a string (as in CSV files) or one string."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            pass
    texts = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(
        isinstance(text, (str, int, float)) and not isinstance(text, bool) and str(text).strip() for text in texts
    ):
        raise ValueError(f"{name}: expected a string or a list of strings, got {repr(value)[:60]}")
    return [clean(str(text)) for text in texts]


def clean(text: str) -> str:
    """Replace what JSON can write and no file or tokenizer can take: half of a surrogate pair."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
