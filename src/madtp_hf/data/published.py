"""Read NLVR2, VQAv2, COCO captions and Flickr30k, from the files that their publishers ship or from the Hub.

For each data set, the readers know its authors' files (for the splits of COCO and Flickr30k, Karpathy's as well),
BLIP's own JSON lists and, for Flickr30k, Kaggle's file. For data of your own see `rows.py`. A reader takes

- a file, or a folder that holds the split's file under its publisher's name (the authors' files are tried before
  BLIP's). Each image is looked up in the image folder, at the path that the file gives or implies and then directly
  by its name. A path that leads out of the image folder is refused; links inside the folder are followed, since they
  are its owner's. Archives are not opened.
- if there is no such file or folder, the name of a data set on the Hub, and optionally its column names.

It returns a `datasets.Dataset` whose images are paths. All of them exist when the reader returns; an image is opened
only when its row is read. A reader never returns partial data: an error names the file and the line or, for JSON
lists, the entry, counted from 1.
"""

import json
import os
import re
import warnings
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from .image_files import path_inside


LABELS = ("False", "True")

# From the split that a caller asks for to its publisher's name for it, in file names and image names.
_NLVR2_SPLITS = {
    "train": "train",
    "validation": "dev",
    "dev": "dev",
    "test": "test1",
    "test1": "test1",
    "test2": "test2",
}
_VQAV2_SPLITS = {"train": "train2014", "validation": "val2014", "val": "val2014"}
_VQAV2_SPLITS |= {"test": "test2015", "test-dev": "test-dev2015"}
_KARPATHY_SPLITS = {"train": "train", "validation": "val", "val": "val", "test": "test"}

_AS_SHIPPED = "Download the file again from its publisher, or fix that entry."
_KINDS = {str: "a string", int: "a whole number", list: "a list"}


def load_nlvr2(path, split: str, image_dir=None, columns: dict[str, str] | None = None, where=None):
    """Read NLVR2: is the sentence true of the two images?

    Args:
        path (`str` or `Path`): The authors' `train.json`, `dev.json`, `test1.json` or `test2.json` (one object per
            line), BLIP's `nlvr_train.json`, `nlvr_dev.json` or `nlvr_test.json`, a folder with one of them, or a data
            set on the Hub.
        split (`str`): `"train"`, `"validation"` (`"dev"`), `"test"` (`"test1"`) or `"test2"`; on the Hub, the data
            set's own name of the split.
        image_dir (`str` or `Path`, *optional*): The image folder, by default the file's folder. The authors' images
            are in its `train/<directory>/`, `dev/`, `test1/`, or in the same folders below `images/`.
        columns (`dict[str, str]`, *optional*): For the Hub, a mapping from the columns named below to the data set's
            names, where they differ: `{"sentence": "text"}`.
        where (`dict[str, str]`, *optional*): For the Hub, keep only rows with these values, for data sets with a
            column for the split: `{"split": "val"}`.

    Returns:
        `datasets.Dataset` with the columns `left_image`, `right_image` (images), `sentence` (string), `label` (class
        label, 0 "False" and 1 "True") and `identifier` (string, `<split>-<set>-<pair>-<sentence>`; rows that differ
        only in the pair ask about the same sentence, which NLVR2's consistency metric relies on). BLIP's files lack
        the last part; there it is the sentence's index within its set, in order of appearance.

    Raises:
        `FileNotFoundError`: no such file, folder, image or data set. `ValueError`: an unknown split, a file that is
        empty, malformed or of another split, an image path that leads out of the image folder; on the Hub, a column
        that is missing or has another type.
    """
    from datasets import ClassLabel, Features, Image, Value

    features = Features(
        {
            "left_image": Image(),
            "right_image": Image(),
            "sentence": Value("string"),
            "label": ClassLabel(names=list(LABELS)),
            "identifier": Value("string"),
        }
    )
    if not _is_local(path, columns, where, image_dir=image_dir):
        return _load_from_hub(path, split, features, columns, where)
    name = _split_name(split, _NLVR2_SPLITS)
    file = _find_file(path, [f"{name}.json", f"nlvr_{name.removesuffix('1')}.json"])
    find_image = _image_finder(image_dir, file, "images")
    text = _read_text(file)
    pairs = _blip_pairs(text, file) if text.lstrip().startswith("[") else _official_pairs(text, file)
    rows = []
    for where, entry, identifier, images in pairs:
        if not re.fullmatch(rf"{name}-\d+-\d+-\d+", identifier):
            raise ValueError(
                f"{where}: identifier {identifier!r}: expected {name}-<set>-<pair>-<sentence> in the split {split!r} "
                "(BLIP's follow from the images' names). Choose the file's split."
            )
        label = _field(entry, "label", where, str)
        if label not in LABELS:
            raise ValueError(f"{where}: unknown label {label!r}: expected {' or '.join(LABELS)}. {_AS_SHIPPED}")
        rows.append(
            {
                "left_image": find_image(images[0], where),
                "right_image": find_image(images[1], where),
                "sentence": _field(entry, "sentence", where, str),
                "label": LABELS.index(label),
                "identifier": identifier,
            }
        )
    return _dataset(rows, features, file)


def _official_pairs(text: str, file: Path):
    """Yield (place, entry, identifier, paths of the two images) for each of the authors' lines."""
    for number, line in _lines(text):
        where = f"{file}, line {number}"
        entry = _parse(line, file, number)
        identifier = _field(entry, "identifier", where, str)
        pair, folder = identifier.rpartition("-")[0], identifier.partition("-")[0]
        if folder == "train":
            folder += f"/{_field(entry, 'directory', where, int, str)}"
        yield where, entry, identifier, [f"{folder}/{pair}-img{side}.png" for side in (0, 1)]


def _blip_pairs(text: str, file: Path):
    """Yield the same as `_official_pairs` for each of BLIP's entries."""
    sentences: dict = defaultdict(dict)  # for each set, the index of each sentence
    seen: Counter[tuple] = Counter()
    for where, entry in _entries(_parse(text, file), file):
        images = _texts(entry, "images", where)
        if len(images) != 2:
            raise ValueError(f"{where}: expected two images, left and right, got {len(images)}. {_AS_SHIPPED}")
        pair = PurePosixPath(images[0]).stem.removesuffix("-img0")
        of_set = sentences[pair.rpartition("-")[0]]
        sentence = _field(entry, "sentence", where, str)
        # If a set has two identical sentences, the pair occurs twice; counting keeps the identifiers unique.
        number = of_set.setdefault((sentence, seen[pair, sentence]), len(of_set))
        seen[pair, sentence] += 1
        yield where, entry, f"{pair}-{number}", images


def load_vqav2(path, split: str, image_dir=None, annotations=None, columns: dict[str, str] | None = None, where=None):
    """Read VQAv2: questions about COCO's images, each with answers by ten people.

    Args:
        path (`str` or `Path`): The authors' `v2_OpenEnded_mscoco_<subset>_questions.json` (subset `train2014`,
            `val2014`, `test2015` or `test-dev2015`), BLIP's `vqa_train.json`, `vqa_val.json` or `vqa_test.json`, a
            folder with one of them, or a data set on the Hub.
        split (`str`): `"train"`, `"validation"` (`"val"`), `"test"` or, for the authors' files, `"test-dev"`; on the
            Hub, the data set's own name of the split.
        image_dir (`str` or `Path`, *optional*): The image folder, by default the file's folder. The authors' images
            are in its `train2014/`, `val2014/`, `test2015/`.
        annotations (`str` or `Path`, *optional*): The authors' annotations, by default
            `v2_mscoco_<subset>_annotations.json` beside the questions. The test splits have none.
        columns, where (`dict[str, str]`, *optional*): As in `load_nlvr2`.

    Returns:
        `datasets.Dataset` with the columns `image`, `question` (string), `question_id` (int64) and `answers` (list of
        strings: all given answers in their order, usually ten; empty in the test splits).

    Raises:
        As `load_nlvr2`; also `ValueError` for a question without annotation.
    """
    from datasets import Features, Image, Sequence, Value

    features = Features(
        {
            "image": Image(),
            "question": Value("string"),
            "question_id": Value("int64"),
            "answers": Sequence(Value("string")),
        }
    )
    if not _is_local(path, columns, where, image_dir=image_dir, annotations=annotations):
        return _load_from_hub(path, split, features, columns, where)
    subset = _split_name(split, _VQAV2_SPLITS)
    blip_file = f"vqa_{re.sub('20..', '', subset)}.json"
    file = _find_file(path, [f"v2_OpenEnded_mscoco_{subset}_questions.json", blip_file])
    find_image = _image_finder(image_dir, file)
    document = _parse(_read_text(file), file)
    read = _blip_questions if isinstance(document, list) else _official_questions
    rows = [
        {
            "image": find_image(image, where),
            "question": _field(entry, "question", where, str),
            "question_id": _field(entry, "question_id", where, int),
            "answers": answers,
        }
        for where, entry, image, answers in read(document, subset, file, annotations)
    ]
    return _dataset(rows, features, file)


def _blip_questions(document: list, subset: str, file: Path, annotations):
    """Yield (place, entry, path of the image, answers) for each of BLIP's entries."""
    if annotations is not None:
        raise ValueError(f"{file} contains its answers: leave `annotations` out.")
    for where, entry in _entries(document, file):
        image, unanswered = _field(entry, "image", where, str), subset.startswith("test") and "answer" not in entry
        yield where, entry, image, [] if unanswered else _texts(entry, "answer", where)


def _official_questions(document, subset: str, file: Path, annotations):
    """Yield the same as `_blip_questions` for each of the authors' questions."""
    questions = _field(document, "questions", file, list)
    if document.get("data_subtype", subset) != subset:
        raise ValueError(f"{file} is of {document['data_subtype']!r}: expected {subset!r}. Choose the file's split.")
    is_test = subset.startswith("test")
    answers = {} if is_test else _official_answers(file, annotations)
    folder = "test2015" if is_test else subset  # test-dev is a subset of test
    for where, entry in _entries(questions, f"{file}, questions"):
        question_id = _field(entry, "question_id", where, int)
        if not is_test and question_id not in answers:
            raise ValueError(
                f"{where}: question_id {question_id} has no annotation: expected both files to be of one split and"
                " version."
            )
        image = f"{folder}/COCO_{folder}_{_field(entry, 'image_id', where, int):012d}.jpg"
        yield where, entry, image, answers.get(question_id, [])


def _official_answers(questions: Path, annotations) -> dict[int, list[str]]:
    """Return the answers to each question id, from `annotations` or else the annotations beside `questions`."""
    beside = questions.with_name(questions.name.replace("OpenEnded_", "").replace("_questions", "_annotations"))
    file = beside if annotations is None else Path(annotations).expanduser()
    if file == questions or not file.is_file():
        expected = "v2_mscoco_<subset>_annotations.json next to it" if file == questions else file
        raise FileNotFoundError(
            f"There are no annotations of {questions}: expected {expected}. Put them there, or pass `annotations`."
        )
    answers, document = {}, _parse(_read_text(file), file)
    for where, entry in _entries(_field(document, "annotations", file, list), f"{file}, annotations"):
        given = _entries(_field(entry, "answers", where, list), f"{where}, answers")
        answers[_field(entry, "question_id", where, int)] = [_field(one, "answer", place, str) for place, one in given]
    return answers


def load_coco_captions(
    path, split: str, image_dir=None, include_restval: bool = True, columns: dict[str, str] | None = None, where=None
):
    """Read COCO captions, in Karpathy's splits or COCO's own, one row per image.

    Args:
        path (`str` or `Path`): Karpathy's `dataset_coco.json`, BLIP's `coco_karpathy_train.json` (one caption per
            entry; the reader groups them by image), `coco_karpathy_val.json` or `coco_karpathy_test.json`, COCO's own
            `captions_train2014.json` or `captions_val2014.json` or those of 2017 (with COCO's own splits, so none for
            `"test"`), a folder with one of them or with COCO's `annotations/`, or a data set on the Hub.
        split (`str`): `"train"`, `"validation"` (`"val"`) or `"test"`; on the Hub, the data set's own name of the
            split.
        image_dir (`str` or `Path`, *optional*): The image folder, by default the file's folder or, for a file in
            `annotations/`, the folder above. Images are in its `train2014/` and `val2014/`, or `train2017/` and
            `val2017/`.
        include_restval (`bool`, *optional*, defaults to `True`): Whether `"train"` includes Karpathy's "restval", the
            rest of COCO's validation images. BLIP's file always includes it.
        columns, where (`dict[str, str]`, *optional*): As in `load_nlvr2`.

    Returns:
        `datasets.Dataset` with the columns `image`, `captions` (list of strings, in their order) and `image_id`
        (string: COCO's number, without leading zeros).

    Raises:
        As `load_nlvr2`.
    """
    features = _caption_features()
    if not _is_local(path, columns, where, image_dir=image_dir):
        return _load_from_hub(path, split, features, columns, where)
    name = _split_name(split, _KARPATHY_SPLITS)
    official = [f"{folder}captions_{name}{year}.json" for folder in ("", "annotations/") for year in (2014, 2017)]
    file = _find_file(path, ["dataset_coco.json", f"coco_karpathy_{name}.json", *official])
    document = _parse(_read_text(file), file)
    with_restval = name == "train" and include_restval
    if isinstance(document, dict) and "annotations" in document:
        entries = _coco_entries(document, file, name)
        if image_dir is None and file.parent.name == "annotations":
            image_dir = file.parent.parent
    elif isinstance(document, dict):
        entries = _karpathy_entries(document, file, {name, "restval"} if with_restval else {name})
    elif name == "train" and not include_restval:
        raise ValueError(f"{file} does not separate restval from train: use Karpathy's dataset_coco.json.")
    else:
        entries = _entries(document, file)
    return _dataset(_caption_rows(entries, _image_finder(image_dir, file)), features, file)


def load_flickr30k(
    path, split: str, image_dir=None, columns: dict[str, str] | None = None, where=None, on_error: str = "raise"
):
    """Read Flickr30k captions, one row per image.

    Args:
        path (`str` or `Path`): Karpathy's `dataset_flickr30k.json`, BLIP's `flickr30k_train.json`,
            `flickr30k_val.json` or `flickr30k_test.json`, the authors' `results_20130124.token` or Kaggle's
            `results.csv` (both without splits), a folder with one of them (tried in this order), or a data set on the
            Hub.
        split (`str`): `"train"`, `"validation"` (`"val"`) or `"test"`; also `"all"` for Karpathy's file, and only
            `"all"` for the files without splits. On the Hub, the data set's own name of the split.
        image_dir (`str` or `Path`, *optional*): The image folder, by default the file's folder. Images are in it or in
            its `flickr30k-images/` or `flickr30k_images/`.
        columns, where (`dict[str, str]`, *optional*): As in `load_nlvr2`.
        on_error (`str`, *optional*, defaults to `"raise"`): What to do with a malformed line of
            `results_20130124.token` or `results.csv`: `"skip"` leaves it out, with a warning that names it. Kaggle's
            file has one such line.

    Returns:
        `datasets.Dataset` with the columns `image`, `captions` (list of strings, in their order) and `image_id`
        (string: the image's name without its suffix).

    Raises:
        As `load_nlvr2`.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}: expected 'raise' or 'skip'.")
    features = _caption_features()
    if not _is_local(path, columns, where, image_dir=image_dir):
        return _load_from_hub(path, split, features, columns, where)
    name = _split_name(split, {**_KARPATHY_SPLITS, "all": "all"})
    line_files = {".token": _TOKEN_LINE, ".csv": _KAGGLE_LINE}
    names = ["dataset_flickr30k.json", f"flickr30k_{name}.json", "results_20130124.token", "results.csv"]
    file = _find_file(path, names)
    text = _read_text(file)
    if file.suffix in line_files:
        if name != "all":
            raise ValueError(
                f"{file} has no splits: expected split='all', got {split!r}. For a split, use dataset_flickr30k.json."
            )
        entries = _line_entries(text, file, *line_files[file.suffix], on_error)
    elif isinstance(document := _parse(text, file), dict):
        entries = _karpathy_entries(document, file, {"train", "val", "test"} if name == "all" else {name})
    elif name == "all":
        raise ValueError(f"{file} has one split: expected its name, got split='all'.")
    else:
        entries = _entries(document, file)
    return _dataset(
        _caption_rows(entries, _image_finder(image_dir, file, "flickr30k-images", "flickr30k_images")), features, file
    )


def _caption_features():
    from datasets import Features, Image, Sequence, Value

    return Features({"image": Image(), "captions": Sequence(Value("string")), "image_id": Value("string")})


def _karpathy_entries(document: dict, file: Path, splits: set[str]):
    """Yield (place, entry in BLIP's form) for each image of `splits`."""
    images = _field(document, "images", file, list)
    for where, entry in _entries(images, f"{file}, images"):
        split = _field(entry, "split", where, str)
        if split not in ("train", "restval", "val", "test"):
            raise ValueError(f"{where}: unknown split {split!r}: expected train, restval, val or test. {_AS_SHIPPED}")
        if split not in splits:
            continue
        image = _field(entry, "filename", where, str)
        if "filepath" in entry:  # only COCO has it
            image = f"{_field(entry, 'filepath', where, str)}/{image}"
        sentences = _entries(_field(entry, "sentences", where, list), f"{where}, sentences")
        captions = [_field(sentence, "raw", place, str) for place, sentence in sentences]
        number = {"cocoid": _field(entry, "cocoid", where, int)} if "cocoid" in entry else {}
        yield where, {"image": image, "caption": captions, **number}


def _coco_entries(document: dict, file: Path, split: str):
    """Yield (place, entry in BLIP's form) for each caption of COCO's own file, then check that all images have one."""
    of_split = re.fullmatch(r"captions_(train|val)\d+\.json", file.name)
    if of_split and of_split[1] != split:
        raise ValueError(f"{file} is for the split {of_split[1]!r}: expected {split!r}. Choose the file's split.")
    images = {}
    for where, entry in _entries(_field(document, "images", file, list), f"{file}, images"):
        name = _field(entry, "file_name", where, str)
        # The names in the 2017 files don't tell the image folder, but the images' URLs do.
        found = re.search(r"(?:train|val)20\d\d(?=[/_])", f"{name}/{entry.get('coco_url', '')}")
        folder = found[0] if found else file.stem.removeprefix("captions_")
        images[_field(entry, "id", where, int)] = (where, f"{folder}/{PurePosixPath(name).name}")
    captioned = set()
    for where, entry in _entries(_field(document, "annotations", file, list), f"{file}, annotations"):
        number = _field(entry, "image_id", where, int)
        if number not in images:
            raise ValueError(f"{where}: image_id {number} is not one of the file's images. {_AS_SHIPPED}")
        captioned.add(number)
        caption = _field(entry, "caption", where, str).strip()
        yield where, {"image": images[number][1], "caption": caption, "cocoid": number}
    for number, (where, _) in images.items():
        if number not in captioned:
            raise ValueError(f"{where}: the image {number} has no caption. {_AS_SHIPPED}")


# For files with one caption per line: a line's pattern, its form for messages, and the header's pattern or None.
_TOKEN_LINE = (re.compile(r"(.+)#\d+\t(.*)"), "<image>#<number><tab><caption>", None)
_KAGGLE_LINE = (
    re.compile(r"([^|]*[^|\s])\s*\|\s*\d+\s*\|\s*(.*\S)\s*"),
    "<image>| <number>| <caption>",
    re.compile(r"image_name\s*\|\s*comment_number\s*\|\s*comment\s*"),
)


def _line_entries(text: str, file: Path, pattern: re.Pattern, form: str, heading: re.Pattern | None, on_error: str):
    """Yield (place, entry in BLIP's form) for each line."""
    for number, line in _lines(text):
        if number == 1 and heading is not None and heading.fullmatch(line):
            continue
        match, where = pattern.fullmatch(line), f"{file}, line {number}"
        if match is not None:
            yield where, {"image": match[1], "caption": match[2]}
            continue
        problem = f"{where}: expected {form}, got {line[:60]!r}"
        if on_error == "raise":
            raise ValueError(f"{problem}. {_AS_SHIPPED} To leave it out, pass on_error='skip'.")
        warnings.warn(f"{problem}. The line is left out.", stacklevel=2)


def _caption_rows(entries, find_image) -> list[dict]:
    """Return one row per image, in order of first appearance, from one or more entries for each image."""
    rows = {}
    for where, entry in entries:
        image = _field(entry, "image", where, str)
        captions = _texts(entry, "caption", where)
        if not captions:
            raise ValueError(f"{where}: expected at least one caption, got none. {_AS_SHIPPED}")
        if image not in rows:
            stem = PurePosixPath(image).stem
            number = re.fullmatch(r"COCO_\w+_0*(\d+)", stem)
            # BLIP's files have an image_id too, but only in the training splits.
            image_id = str(entry["cocoid"]) if "cocoid" in entry else number[1] if number else stem
            rows[image] = {"image": find_image(image, where), "captions": [], "image_id": image_id}
        rows[image]["captions"] += captions
    return list(rows.values())


def _split_name(split: str, names: dict[str, str]) -> str:
    if split not in names:
        raise ValueError(f"split={split!r}: expected one of {', '.join(names)}.")
    return names[split]


def _is_local(path, columns, where=None, **local_options) -> bool:
    """Return whether `path` exists locally and so is not a data set on the Hub; reject options of the other kind."""
    is_local = Path(path).expanduser().exists()
    hub_id = isinstance(path, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path)
    if not is_local and (not hub_id or path.endswith((".json", ".jsonl", ".token", ".csv"))):
        raise FileNotFoundError(
            f"{path} does not exist: expected a split's file, a folder that holds it, or a data set on the Hub"
            " (owner/name)."
        )
    others = {"columns": columns, "where": where} if is_local else local_options
    if given := [name for name, value in others.items() if value is not None]:
        kinds = ("data sets on the Hub", "is") if is_local else ("files", "is not")
        raise ValueError(
            f"`{'`, `'.join(given)}` is for {kinds[0]}, and {path} {kinds[1]} a local file or folder: leave it out, or"
            " correct the path."
        )
    return is_local


def _find_file(path, names: list[str]) -> Path:
    """Return `path` if it is a file, or else the first of `names` that exists in it."""
    path = Path(path).expanduser()
    if path.is_file():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path} has none of {', '.join(names)}: put one there, or give the file's path.")


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    if not data.strip():
        raise ValueError(f"{file}, line 1: the file is empty. Download it again.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: not UTF-8 text ({error.reason}). Download the file again.") from error


def _lines(text: str):
    """Yield (number, line) for each line that is not blank."""
    for number, line in enumerate(text.split("\n"), 1):  # splitlines also splits inside sentences
        if line.strip():
            yield number, line.rstrip("\r")


def _parse(text: str, file: Path, line: int = 1):
    """Parse the JSON `text`, which starts at line `line` of `file`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}, line {line + error.lineno - 1}, column {error.colno}: not JSON ({error.msg}). Download the file"
            " again, or fix that line."
        ) from error


def _entries(items, where):
    """Yield (place, entry) for each entry of a JSON list; `_field` checks that it is an object."""
    if not isinstance(items, list) or not items:
        got = "an empty one" if items == [] else type(items).__name__
        raise ValueError(f"{where}: expected a JSON list of objects, got {got}. {_AS_SHIPPED}")
    shown = tqdm(items, desc=Path(where).name, leave=False, disable=len(items) <= 10_000)
    return ((f"{where}, entry {number}", entry) for number, entry in enumerate(shown, 1))


def _field(entry: dict, name: str, where, *kinds: type):
    """Return a field of an entry, which must have one of the types `kinds` (`str`, `int`, `list`)."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected a JSON object, got {repr(entry)[:60]}. {_AS_SHIPPED}")
    if type(entry.get(name)) not in kinds:  # not isinstance: JSON's true is no number
        got = f"an entry without it (fields: {', '.join(entry) or 'none'})"
        got = repr(entry[name])[:60] if name in entry else got
        expected = " or ".join(_KINDS[kind] for kind in kinds)
        raise ValueError(f"{where}: field {name!r}: expected {expected}, got {got}. {_AS_SHIPPED}")
    return entry[name]


def _texts(entry: dict, name: str, where) -> list[str]:
    """Return a field of strings; a single string counts as a list of one."""
    texts = _field(entry, name, where, list, str)
    texts = [texts] if isinstance(texts, str) else texts
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{where}: field {name!r}: expected only strings, got {repr(text)[:60]}. {_AS_SHIPPED}")
    return texts


def _image_finder(image_dir, file: Path, *subfolders: str):
    """Return a function from an image's path in the data to its path on this machine."""
    folder = os.path.abspath(file.parent if image_dir is None else Path(image_dir).expanduser())
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"image_dir={image_dir} is not a directory: expected the folder where image paths start."
        )
    known = {}

    def find(image: str, where) -> str:
        if image not in known:
            try:
                path_inside(image, folder, allow_absolute=False)
            except ValueError as error:
                raise ValueError(f"{where}: {error}. {_AS_SHIPPED}") from None
            names = (image, *(f"{folder}/{image}" for folder in subfolders), PurePosixPath(image).name)
            tried = [os.path.normpath(name) for name in names]
            name = next((name for name in tried if os.path.isfile(os.path.join(folder, name))), None)
            if name is None:
                raise FileNotFoundError(
                    f"{where}: {folder} has no image {' or '.join(dict.fromkeys(tried))}. Pass `image_dir`, the"
                    " folder of the images, or add this one."
                )
            known[image] = os.path.join(folder, name)
        return known[image]

    return find


def _dataset(rows: list[dict], features, file: Path):
    from datasets import Dataset

    if not rows:
        raise ValueError(f"{file} contains nothing of the split: choose another split or file.")
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def _rows_where(dataset, where: dict, name: str):
    """Return the rows whose columns have these values; reads only these columns, no image."""
    values = dataset.select_columns(list(where)).to_dict()
    chosen = [row for row in range(len(dataset)) if all(values[key][row] == wanted for key, wanted in where.items())]
    if not chosen:
        found = {key: sorted(set(map(str, values[key])))[:10] for key in where}
        raise ValueError(f"{name} has no row where {where}: its values are {found}.")
    return dataset.select(chosen)


def _load_from_hub(name: str, split: str, features, columns: dict[str, str] | None, where: dict | None = None):
    """Load a split of a data set on the Hub, filtered by `where`, with our columns, names and types."""
    from datasets import load_dataset

    theirs = {ours: ours for ours in features} | (columns or {})
    if len(theirs) > len(features) or len(set(theirs.values())) < len(features):
        raise ValueError(
            f"columns={columns}: expected for each of {', '.join(features)} a column of its own, and no more."
        )
    try:
        dataset = load_dataset(name, split=split)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is not a local file or folder, and can't be read as a data set on the Hub: {error}"
        ) from error
    missing = [column for column in (*theirs.values(), *(where or {})) if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"{name} has no column {', '.join(missing)}: it has {', '.join(dataset.column_names)}. "
            f"Pass `columns`, a dict from {', '.join(features)} to its names."
        )
    if where:
        dataset = _rows_where(dataset, where, name)
    dataset = dataset.select_columns(list(theirs.values()))
    dataset = dataset.rename_columns({name: ours for ours, name in theirs.items()})
    for column, feature in features.items():
        given = dataset.features[column]
        try:
            dataset = _cast(dataset, column, feature)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"{name}: column {theirs[column]!r} is {given}: expected {feature} for {column!r} ({error}). "
                "Load it with datasets.load_dataset and convert that column."
            ) from error
    return dataset


def _cast(dataset, column: str, feature):
    """Return the data set with a column of this type; raise an error if its values would change their meaning."""
    from datasets import ClassLabel

    given, order = dataset.features[column], dataset.column_names
    if isinstance(given, ClassLabel) and given.names != getattr(feature, "names", None):
        raise TypeError(f"its classes are {given.names}")
    if getattr(feature, "feature", None) == given:  # one value per row, where we have a list
        values = [[value] for value in dataset[column]]
        dataset = dataset.remove_columns(column).add_column(column, values).select_columns(order)
    if dataset.features[column] != feature:
        dataset = dataset.cast_column(column, feature)
    if isinstance(feature, ClassLabel) and not {0, 1}.issuperset(labels := dataset.unique(column)):
        raise TypeError(f"its labels are {labels}")
    return dataset
