"""Readers of NLVR2, VQAv2, and COCO and Flickr30k captions, from their publishers' files or from the Hub.

Of each data set the readers know the files of its authors (of COCO's and Flickr30k's splits, Karpathy's as well),
those of BLIP's, who wrote JSON lists of their own, and of Flickr30k Kaggle's. Tables of your own are for `tables.py`.
A reader takes

- a file, or a folder with the split's file under its publisher's name (the authors' before BLIP's). Every image is
  looked for below the image folder at the path that the file gives or implies, and in the folder itself by its name. A
  path that leads out of the image folder is refused; links in the folder, which are its owner's, are followed. No
  archive is opened.
- where there is no such file or folder, a data set on the Hub, and what its columns are called.

It gives a `datasets.Dataset` whose images are paths: all exist when the reader returns, none is opened before its row
is read. Nothing is read by halves: an error names the file and the line, or, in a JSON list, the entry, counted from
1.
"""

import json
import os
import re
import warnings
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm


LABELS = ("False", "True")

# From the split that a caller asks for to what its publisher calls it, in names of files and of images.
_NLVR2_SPLITS = {
    "train": "train",
    "validation": "dev",
    "dev": "dev",
    "test": "test1",
    "test1": "test1",
    "test2": "test2",
}
_VQAV2_SPLITS = {
    "train": "train2014",
    "validation": "val2014",
    "val": "val2014",
    "test": "test2015",
    "test-dev": "test-dev2015",
}
_KARPATHY_SPLITS = {"train": "train", "validation": "val", "val": "val", "test": "test"}

_AS_SHIPPED = "take the file as its publisher ships it, or mend that place"
# Absolute, with a drive, or with a ".." anywhere: on Windows as on POSIX, whichever this machine runs.
_LEADS_OUT = re.compile(r"[/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|$)", re.DOTALL)
_KINDS = {str: "a string", int: "a whole number", list: "a list"}


def load_nlvr2(path, split: str, image_dir=None, columns: dict[str, str] | None = None, where=None):
    """Load NLVR2: statements about two images, true or false.

    Args:
        path (`str` or `Path`):
            The authors' `train.json`, `dev.json`, `test1.json` or `test2.json` (an object a line), BLIP's
            `nlvr_train.json`, `nlvr_dev.json` or `nlvr_test.json`, a folder with one of them, or a data set on the
            Hub.
        split (`str`):
            `"train"`, `"validation"` (`"dev"`), `"test"` (`"test1"`) or `"test2"`; on the Hub, what the data set calls
            it.
        image_dir (`str` or `Path`, *optional*):
            The image folder, by default the file's: the authors' images are in its `train/<directory>/`, `dev/`,
            `test1/`, or in the same below `images/`.
        columns (`dict[str, str]`, *optional*):
            For the Hub, from columns named below to what the data set calls them, where that differs:
            `{"sentence": "text"}`.
        where (`dict[str, str]`, *optional*):
            For the Hub, the rows to take, where the split is a column: `{"split": "val"}`.

    Returns:
        `datasets.Dataset` with the columns `left_image`, `right_image` (images), `sentence` (string), `label` (class
        label, 0 "False" and 1 "True") and `identifier` (string, `<split>-<set>-<pair>-<sentence>`; rows that differ in
        the pair alone ask about the same sentence, as NLVR2's consistency has it). BLIP's files lack the last part: it
        is which of its set's sentences, in order of appearance, the sentence is.

    Raises:
        `FileNotFoundError`: no such file, folder, image or data set. `ValueError`: an unknown split, a file that is
        empty, malformed or of another split, an image path that leads out of the image folder; of the Hub, a missing
        column or one of another type.
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
                "(BLIP's follow from the images' names); choose the split that the file is of"
            )
        label = _field(entry, "label", where, str)
        if label not in LABELS:
            raise ValueError(f"{where}: unknown label {label!r}: expected {' or '.join(LABELS)}; {_AS_SHIPPED}")
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
    """(place, entry, identifier, paths of the two images) of each of the authors' lines."""
    for number, line in _lines(text):
        where = f"{file}, line {number}"
        entry = _checked_entry(_parse(line, file, number), where)
        identifier = _field(entry, "identifier", where, str)
        pair, folder = identifier.rpartition("-")[0], identifier.partition("-")[0]
        if folder == "train":
            folder += f"/{_field(entry, 'directory', where, int, str)}"
        yield where, entry, identifier, [f"{folder}/{pair}-img{side}.png" for side in (0, 1)]


def _blip_pairs(text: str, file: Path):
    """The same of each of BLIP's entries."""
    sentences = defaultdict(dict)  # of each set, the number of each sentence
    seen = Counter()
    for where, entry in _entries(_parse(text, file), file):
        images = _texts(entry, "images", where)
        if len(images) != 2:
            raise ValueError(f"{where}: expected two images, left and right, got {len(images)}; {_AS_SHIPPED}")
        pair = PurePosixPath(images[0]).stem.removesuffix("-img0")
        of_set = sentences[pair.rpartition("-")[0]]
        sentence = _field(entry, "sentence", where, str)
        # Were two sentences of a set the same words, a pair would have them twice: identifiers stay unique.
        number = of_set.setdefault((sentence, seen[pair, sentence]), len(of_set))
        seen[pair, sentence] += 1
        yield where, entry, f"{pair}-{number}", images


def load_vqav2(path, split: str, image_dir=None, annotations=None, columns: dict[str, str] | None = None, where=None):
    """Load VQAv2: questions about COCO's images, each with ten people's answers.

    Args:
        path (`str` or `Path`):
            The authors' `v2_OpenEnded_mscoco_<subset>_questions.json` (subset `train2014`, `val2014`, `test2015` or
            `test-dev2015`), BLIP's `vqa_train.json`, `vqa_val.json` or `vqa_test.json`, a folder with one of them, or
            a data set on the Hub.
        split (`str`):
            `"train"`, `"validation"` (`"val"`), `"test"` or, of the authors' files, `"test-dev"`; on the Hub, what the
            data set calls it.
        image_dir (`str` or `Path`, *optional*):
            The image folder, by default the file's: the authors' images are in its `train2014/`, `val2014/`,
            `test2015/`.
        annotations (`str` or `Path`, *optional*):
            The authors' annotations, by default `v2_mscoco_<subset>_annotations.json` beside the questions. The test
            splits have none.
        columns, where (`dict[str, str]`, *optional*):
            As `load_nlvr2`'s.

    Returns:
        `datasets.Dataset` with the columns `image`, `question` (string), `question_id` (int64) and `answers` (list of
        strings: all that were given, in their order, usually ten; none in the test splits).

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
    """(place, entry, path of the image, answers) of each of BLIP's entries."""
    if annotations is not None:
        raise ValueError(f"{file} has its answers in it: leave annotations= out")
    for where, entry in _entries(document, file):
        unanswered = subset.startswith("test") and "answer" not in entry
        yield where, entry, _field(entry, "image", where, str), [] if unanswered else _texts(entry, "answer", where)


def _official_questions(document, subset: str, file: Path, annotations):
    """The same of each of the authors' questions."""
    questions = _field(_checked_entry(document, file), "questions", file, list)
    if document.get("data_subtype", subset) != subset:
        raise ValueError(
            f"{file} is of {document['data_subtype']!r}: expected {subset!r}; choose the split that the file is of"
        )
    is_test = subset.startswith("test")
    answers = {} if is_test else _official_answers(file, annotations)
    folder = "test2015" if is_test else subset  # test-dev is a part of test
    for where, entry in _entries(questions, f"{file}, questions"):
        question_id = _field(entry, "question_id", where, int)
        if not is_test and question_id not in answers:
            raise ValueError(
                f"{where}: question_id {question_id} has no annotation; take both files of the same split and version"
            )
        image = f"{folder}/COCO_{folder}_{_field(entry, 'image_id', where, int):012d}.jpg"
        yield where, entry, image, answers.get(question_id, [])


def _official_answers(questions: Path, annotations) -> dict[int, list[str]]:
    """The answers to each question id, from the annotations given or else those beside `questions`."""
    beside = questions.with_name(questions.name.replace("OpenEnded_", "").replace("_questions", "_annotations"))
    file = beside if annotations is None else Path(annotations).expanduser()
    if file == questions or not file.is_file():
        expected = "v2_mscoco_<subset>_annotations.json beside it" if file == questions else file
        raise FileNotFoundError(
            f"no annotations of {questions}: expected {expected}; put them there or say with annotations= where they"
            " are"
        )
    answers = {}
    document = _checked_entry(_parse(_read_text(file), file), file)
    for where, entry in _entries(_field(document, "annotations", file, list), f"{file}, annotations"):
        given = _entries(_field(entry, "answers", where, list), f"{where}, answers")
        answers[_field(entry, "question_id", where, int)] = [_field(one, "answer", place, str) for place, one in given]
    return answers


def load_coco_captions(
    path, split: str, image_dir=None, include_restval: bool = True, columns: dict[str, str] | None = None, where=None
):
    """Load COCO captions in Karpathy's splits or COCO's own, one row per image.

    Args:
        path (`str` or `Path`):
            Karpathy's `dataset_coco.json`, BLIP's `coco_karpathy_train.json` (a caption an entry, gathered by image
            here), `coco_karpathy_val.json` or `coco_karpathy_test.json`, COCO's own `captions_train2014.json`,
            `captions_val2014.json` or the same of 2017 (whose splits are COCO's, and which has none for `"test"`), a
            folder with one of them or with COCO's `annotations/`, or a data set on the Hub.
        split (`str`):
            `"train"`, `"validation"` (`"val"`) or `"test"`; on the Hub, what the data set calls it.
        image_dir (`str` or `Path`, *optional*):
            The image folder, by default the file's, or the one that its `annotations/` is in: images are in its
            `train2014/` and `val2014/`, or `train2017/` and `val2017/`.
        include_restval (`bool`, *optional*, defaults to `True`):
            Whether Karpathy's "restval", the rest of COCO's validation images, belongs to `"train"`. In BLIP's file it
            does, once and for all.
        columns, where (`dict[str, str]`, *optional*):
            As `load_nlvr2`'s.

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
        raise ValueError(f"{file} does not tell restval from train; use Karpathy's dataset_coco.json")
    else:
        entries = _entries(document, file)
    return _dataset(_caption_rows(entries, _image_finder(image_dir, file)), features, file)


def load_flickr30k(
    path, split: str, image_dir=None, columns: dict[str, str] | None = None, where=None, on_error: str = "raise"
):
    """Load Flickr30k captions, one row per image.

    Args:
        path (`str` or `Path`):
            Karpathy's `dataset_flickr30k.json`, BLIP's `flickr30k_train.json`, `flickr30k_val.json` or
            `flickr30k_test.json`, the authors' `results_20130124.token` or Kaggle's `results.csv` (which know no
            splits), a folder with one of them (in this order), or a data set on the Hub.
        split (`str`):
            `"train"`, `"validation"` (`"val"`) or `"test"`, of Karpathy's file also `"all"`, of the authors' nothing
            else; on the Hub, what the data set calls it.
        image_dir (`str` or `Path`, *optional*):
            The image folder, by default the file's: images are in it or in its `flickr30k-images/` or
            `flickr30k_images/`.
        columns, where (`dict[str, str]`, *optional*):
            As `load_nlvr2`'s.
        on_error (`str`, *optional*, defaults to `"raise"`):
            What to do about a malformed line of `results_20130124.token` or `results.csv`: `"skip"` leaves it out,
            with a warning that names it. Kaggle's file has one.

    Returns:
        `datasets.Dataset` with the columns `image`, `captions` (list of strings, in their order) and `image_id`
        (string: the image's name without its suffix).

    Raises:
        As `load_nlvr2`.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}: expected 'raise' or 'skip'")
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
                f"{file} knows no splits: expected split='all', got {split!r}; for a split use dataset_flickr30k.json"
            )
        entries = _line_entries(text, file, *line_files[file.suffix], on_error)
    elif isinstance(document := _parse(text, file), dict):
        entries = _karpathy_entries(document, file, {"train", "val", "test"} if name == "all" else {name})
    elif name == "all":
        raise ValueError(f"{file} holds one split: expected its name, got split='all'")
    else:
        entries = _entries(document, file)
    return _dataset(
        _caption_rows(entries, _image_finder(image_dir, file, "flickr30k-images", "flickr30k_images")), features, file
    )


def _caption_features():
    from datasets import Features, Image, Sequence, Value

    return Features({"image": Image(), "captions": Sequence(Value("string")), "image_id": Value("string")})


def _karpathy_entries(document: dict, file: Path, splits: set[str]):
    """(place, entry in BLIP's form) of each image of `splits`."""
    images = _field(document, "images", file, list)
    for where, entry in _entries(images, f"{file}, images"):
        split = _field(entry, "split", where, str)
        if split not in ("train", "restval", "val", "test"):
            raise ValueError(f"{where}: unknown split {split!r}: expected train, restval, val or test; {_AS_SHIPPED}")
        if split not in splits:
            continue
        image = _field(entry, "filename", where, str)
        if "filepath" in entry:  # COCO's alone
            image = f"{_field(entry, 'filepath', where, str)}/{image}"
        sentences = _entries(_field(entry, "sentences", where, list), f"{where}, sentences")
        captions = [_field(sentence, "raw", place, str) for place, sentence in sentences]
        number = {"cocoid": _field(entry, "cocoid", where, int)} if "cocoid" in entry else {}
        yield where, {"image": image, "caption": captions, **number}


def _coco_entries(document: dict, file: Path, split: str):
    """(place, entry in BLIP's form) of each caption of COCO's own file, after checking that every image has one."""
    of_split = re.fullmatch(r"captions_(train|val)\d+\.json", file.name)
    if of_split and of_split[1] != split:
        raise ValueError(f"{file} is of {of_split[1]!r}: expected {split!r}; choose the split that the file is of")
    images = {}
    for where, entry in _entries(_field(document, "images", file, list), f"{file}, images"):
        name = _field(entry, "file_name", where, str)
        # Neither of the two names says where the images of 2017 are, but COCO's address of them does.
        folder = re.search(r"(?:train|val)20\d\d(?=[/_])", f"{name}/{entry.get('coco_url', '')}")
        folder = folder[0] if folder else file.stem.removeprefix("captions_")
        images[_field(entry, "id", where, int)] = (where, f"{folder}/{PurePosixPath(name).name}")
    captioned = set()
    for where, entry in _entries(_field(document, "annotations", file, list), f"{file}, annotations"):
        number = _field(entry, "image_id", where, int)
        if number not in images:
            raise ValueError(f"{where}: image_id {number} is none of the file's images; {_AS_SHIPPED}")
        captioned.add(number)
        caption = _field(entry, "caption", where, str).strip()
        yield where, {"image": images[number][1], "caption": caption, "cocoid": number}
    for number, (where, _) in images.items():
        if number not in captioned:
            raise ValueError(f"{where}: the image {number} has no caption; {_AS_SHIPPED}")


# Of a file with a caption a line: a pattern of the image and the caption, what a line is like, and a heading or None.
_TOKEN_LINE = (re.compile(r"(.+)#\d+\t(.*)"), "<image>#<number><tab><caption>", None)
_KAGGLE_LINE = (
    re.compile(r"([^|]*[^|\s])\s*\|\s*\d+\s*\|\s*(.*\S)\s*"),
    "<image>| <number>| <caption>",
    re.compile(r"image_name\s*\|\s*comment_number\s*\|\s*comment\s*"),
)


def _line_entries(text: str, file: Path, pattern: re.Pattern, form: str, heading: re.Pattern | None, on_error: str):
    """(place, entry in BLIP's form) of each line."""
    for number, line in _lines(text):
        if number == 1 and heading is not None and heading.fullmatch(line):
            continue
        match, where = pattern.fullmatch(line), f"{file}, line {number}"
        if match is not None:
            yield where, {"image": match[1], "caption": match[2]}
            continue
        problem = f"{where}: expected {form}, got {line[:60]!r}"
        if on_error == "raise":
            raise ValueError(f"{problem}; {_AS_SHIPPED}, or leave it out with on_error='skip'")
        warnings.warn(f"{problem}; it is left out", stacklevel=2)


def _caption_rows(entries, find_image) -> list[dict]:
    """A row an image, in the order in which the images first appear, from one entry or more of each."""
    rows = {}
    for where, entry in entries:
        image = _field(entry, "image", where, str)
        captions = _texts(entry, "caption", where)
        if not captions:
            raise ValueError(f"{where}: expected at least one caption, got none; {_AS_SHIPPED}")
        if image not in rows:
            stem = PurePosixPath(image).stem
            number = re.fullmatch(r"COCO_\w+_0*(\d+)", stem)
            # BLIP has an image_id too, but in its training splits alone.
            image_id = str(entry["cocoid"]) if "cocoid" in entry else number[1] if number else stem
            rows[image] = {"image": find_image(image, where), "captions": [], "image_id": image_id}
        rows[image]["captions"] += captions
    return list(rows.values())


def _split_name(split: str, names: dict[str, str]) -> str:
    if split not in names:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(names)}")
    return names[split]


def _is_local(path, columns, where=None, **local_options) -> bool:
    """Whether `path` is here, and so no data set on the Hub; options for the other of the two are refused."""
    if Path(path).expanduser().exists():
        for name, value in (("columns", columns), ("where", where)):
            if value is not None:
                raise ValueError(
                    f"{name}= is for data sets on the Hub, and {path} is a file or folder here; leave {name}= out"
                )
        return True
    hub_id = isinstance(path, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path)
    if not hub_id or path.endswith((".json", ".jsonl", ".token", ".csv")):
        raise FileNotFoundError(
            f"no file or folder {path}: expected a split's file, a folder that holds it, or a data set on the Hub"
            " (owner/name)"
        )
    given = [f"{name}=" for name, value in local_options.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)} is for files, and {path} is no file or folder here; correct the path, or leave it"
            " out to load from the Hub"
        )
    return False


def _find_file(path, names: list[str]) -> Path:
    """`path` itself if it is a file, or the first of `names` that is in it."""
    path = Path(path).expanduser()
    if path.is_file():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"none of {', '.join(names)} in the folder {path}; put one there or give the file's path")


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    if not data.strip():
        raise ValueError(f"{file}, line 1: the file is empty; download it again")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: not UTF-8 text ({error.reason}); download the file again") from error


def _lines(text: str):
    """(number, line) of each line that is not blank."""
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split at what a sentence may hold
        if line.strip():
            yield number, line.rstrip("\r")


def _parse(text: str, file: Path, line: int = 1):
    """What the JSON `text` says, which starts in that line of `file`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}, line {line + error.lineno - 1}, column {error.colno}: not JSON ({error.msg}); download the file"
            " again or mend that line"
        ) from error


def _entries(items, where):
    """(place, entry) of each object of a JSON list."""
    if not isinstance(items, list) or not items:
        got = "an empty one" if items == [] else type(items).__name__
        raise ValueError(f"{where}: expected a JSON list of objects, got {got}; {_AS_SHIPPED}")
    many = len(items) > 10_000
    for number, entry in enumerate(tqdm(items, desc=Path(where).name, leave=False) if many else items, 1):
        place = f"{where}, entry {number}"
        yield place, _checked_entry(entry, place)


def _checked_entry(entry, where) -> dict:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected a JSON object, got {repr(entry)[:60]}; {_AS_SHIPPED}")
    return entry


def _field(entry: dict, name: str, where, *kinds: type):
    """A field of an entry, of one of `kinds` (`str`, `int`, `list`)."""
    if type(entry.get(name)) not in kinds:  # not isinstance: JSON's true is no number
        got = (
            repr(entry[name])[:60] if name in entry else f"an entry without it (fields: {', '.join(entry) or 'none'})"
        )
        expected = " or ".join(_KINDS[kind] for kind in kinds)
        raise ValueError(f"{where}: field {name!r}: expected {expected}, got {got}; {_AS_SHIPPED}")
    return entry[name]


def _texts(entry: dict, name: str, where) -> list[str]:
    """A field of strings; a single string counts as a list of one."""
    texts = _field(entry, name, where, list, str)
    texts = [texts] if isinstance(texts, str) else texts
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{where}: field {name!r}: expected strings alone, got {repr(text)[:60]}; {_AS_SHIPPED}")
    return texts


def _image_finder(image_dir, file: Path, *subfolders: str):
    """A function from an image's path in the data to its path on this machine."""
    folder = os.path.abspath(file.parent if image_dir is None else Path(image_dir).expanduser())
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"image_dir={image_dir} is no folder: expected the one that image paths start from")
    known = {}

    def find(image: str, where) -> str:
        if image not in known:
            if _LEADS_OUT.match(image):
                raise ValueError(
                    f"{where}: image path {image!r} leads out of the image folder: expected one relative to it,"
                    f" without '..'; {_AS_SHIPPED}"
                )
            names = (image, *(f"{folder}/{image}" for folder in subfolders), PurePosixPath(image).name)
            tried = [os.path.normpath(name) for name in names]
            name = next((name for name in tried if os.path.isfile(os.path.join(folder, name))), None)
            if name is None:
                raise FileNotFoundError(
                    f"{where}: no image {' or '.join(dict.fromkeys(tried))} in {folder}; say with image_dir= where the"
                    " images are, or get this one"
                )
            known[image] = os.path.join(folder, name)
        return known[image]

    return find


def _dataset(rows: list[dict], features, file: Path):
    from datasets import Dataset

    if not rows:
        raise ValueError(f"{file} holds nothing of the split; choose another split or file")
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def _rows_where(dataset, where: dict, name: str):
    """The rows of a data set whose columns have these values; only these columns are read, no image."""
    values = dataset.select_columns(list(where)).to_dict()
    chosen = [row for row in range(len(dataset)) if all(values[key][row] == wanted for key, wanted in where.items())]
    if not chosen:
        found = {key: sorted(set(map(str, values[key])))[:10] for key in where}
        raise ValueError(f"{name} has no row where {where}: its values are {found}")
    return dataset.select(chosen)


def _load_from_hub(name: str, split: str, features, columns: dict[str, str] | None, where: dict | None = None):
    """A split of a data set on the Hub, or its rows with the values of `where`: our columns, names and types."""
    from datasets import ClassLabel, load_dataset

    theirs = {ours: ours for ours in features} | (columns or {})
    if len(theirs) > len(features) or len(set(theirs.values())) < len(features):
        raise ValueError(
            f"columns={columns}: expected for each of {', '.join(features)} a column of its own, and no more"
        )
    try:
        dataset = load_dataset(name, split=split)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is no file or folder here, and no data set on the Hub that can be read: {error}"
        ) from error
    missing = [column for column in (*theirs.values(), *(where or {})) if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"{name} has no column {', '.join(missing)}: it has {', '.join(dataset.column_names)}; "
            f"say with columns= which are {', '.join(features)}"
        )
    if where:
        dataset = _rows_where(dataset, where, name)
    dataset = dataset.select_columns(list(theirs.values()))
    dataset = dataset.rename_columns({name: ours for ours, name in theirs.items()})
    for column, feature in features.items():
        given = dataset.features[column]
        try:
            if isinstance(given, ClassLabel) and given.names != getattr(feature, "names", None):
                # A cast would keep the numbers and turn their meaning.
                raise TypeError(f"its classes are {given.names}")
            if getattr(feature, "feature", None) == given:  # one a row, where we have a list
                values = [[value] for value in dataset[column]]
                dataset = dataset.remove_columns(column).add_column(column, values).select_columns(list(features))
            if dataset.features[column] != feature:
                dataset = dataset.cast_column(column, feature)
            if isinstance(feature, ClassLabel) and not {0, 1}.issuperset(labels := dataset.unique(column)):
                raise TypeError(f"its labels are {labels}")
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"{name}: column {theirs[column]!r} is {given}: expected {feature} for {column!r} ({error}); "
                "load it with datasets.load_dataset and convert that column"
            ) from error
    return dataset
