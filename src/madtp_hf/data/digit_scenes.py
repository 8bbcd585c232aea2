"""Digit scenes: real scans of handwritten digits on a cluttered canvas, with questions, captions and statements.

scikit-learn ships 1,797 scans of handwritten digits of 8x8 pixels. A scene places four or five of them, in colour, on
a canvas of 80x80 pixels among strokes and blobs that are not digits. Every digit has a row and a column of its own, so
"leftmost" and "below" have one answer. Questions and captions are about one scene, statements about two. Nothing is
downloaded: a seed gives the same scenes on every machine.

Splits are made by scan: no scan of the test split appears in any training scene.
"""

import hashlib
import importlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image


CANVAS_SIZE = 80
CELL_SIZE = 8  # the size of a scan: a digit falls into one patch or two
GRID_SIZE = CANVAS_SIZE // CELL_SIZE
MAX_DIGITS = 5
NUM_CLUTTER = 18
MAX_JITTER = 1  # pixels, either way

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS = {
    "red": (240, 60, 50),
    "green": (60, 210, 80),
    "blue": (80, 120, 255),
    "yellow": (250, 220, 60),
    "white": (245, 245, 245),
}
COLOR_NAMES = tuple(COLORS)
# Two wordings of each kind of question.
_QUESTIONS = {
    "exists": ("is there a {}?", "does the image show a {}?"),
    "count": ("how many {} are there?", "what is the number of {} in the image?"),
    "color": ("what color is the {}?", "which color does the {} have?"),
    "extreme": ("which digit is {}?", "what is the {} digit in the image?"),
    "neighbor": ("which digit is next {}?", "what is the first digit {}?"),
}
QUESTION_KINDS = tuple(_QUESTIONS)
STATEMENT_KINDS = ("more", "same", "both", "only", "neither", "total", "extreme", "color")
ANSWERS = ("yes", "no", *DIGIT_NAMES, *COLOR_NAMES)
SPLITS = {"train": 0, "validation": 1, "test": 2}

# The axis along which a direction orders digits, and the sign: the digit of rank 0 for "left" is the leftmost one.
_DIRECTIONS = {
    "left": ("columns", 1, "leftmost", "left of"),
    "right": ("columns", -1, "rightmost", "right of"),
    "top": ("rows", 1, "topmost", "above"),
    "bottom": ("rows", -1, "bottommost", "below"),
}


@dataclass
class Scenes:
    """A batch of S scenes with up to K = `MAX_DIGITS` digits each; missing digits are -1 in `digits`.

    images (S, 80, 80, 3) uint8; digits, colors, rows, columns (S, K) int64; targets, counts (S,) int64: the one digit
    that may occur several times in its scene (or not at all), and how often it occurs.
    """

    images: np.ndarray
    digits: np.ndarray
    colors: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    targets: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


@lru_cache
def digit_scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the scans of a split, (n, 8, 8) float32 in [0, 1], and their digits (n,) int64.

    Two thirds of each digit's scans are for training, a ninth for validation, the rest for testing.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}.")
    bunch = _imported("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    # Of every nine scans of a digit, in shuffled order, six are for training, one for validation, two for testing.
    part = np.empty(len(order), dtype=np.int64)
    for digit in range(10):
        members = order[bunch.target[order] == digit]
        part[members] = np.array([0, 0, 0, 0, 0, 0, 1, 2, 2])[np.arange(len(members)) % 9]
    chosen = part == SPLITS[split]
    return (bunch.images[chosen] / 16).astype(np.float32), bunch.target[chosen].astype(np.int64)


@lru_cache
def _clutter_patterns(count: int = 512) -> np.ndarray:
    """Return short strokes, bars and blobs, none of them a digit: (count, 8, 8) float32 in [0, 1]."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[0:CELL_SIZE, 0:CELL_SIZE].astype(np.float32)
    center = rng.uniform(1.5, 5.5, (count, 2, 1, 1)).astype(np.float32)
    angle = rng.uniform(0, np.pi, (count, 1, 1)).astype(np.float32)
    length = rng.uniform(0.5, 3.5, (count, 1, 1)).astype(np.float32)
    dy, dx = y - center[:, 0], x - center[:, 1]
    along = dx * np.cos(angle) + dy * np.sin(angle)
    across = dy * np.cos(angle) - dx * np.sin(angle)
    distance = np.hypot(np.maximum(np.abs(along) - length, 0), across)
    return np.clip(1.6 - distance, 0, 1)


def _stamp(canvas, patterns, colors, top, left) -> None:
    """Blend `patterns` (S, K, 8, 8) with colours (S, K, 3) into `canvas` (S, 80, 80, 3) at `top`, `left` (S, K)."""
    offset = np.arange(CELL_SIZE)
    scene = np.arange(len(canvas))[:, None, None, None]
    y = (top[:, :, None] + offset)[:, :, :, None]
    x = (left[:, :, None] + offset)[:, :, None, :]
    alpha = patterns[..., None]
    canvas[scene, y, x] = canvas[scene, y, x] * (1 - alpha) + colors[:, :, None, None, :] * alpha


def draw_scenes(
    num_scenes: int, split: str, rng: np.random.Generator, targets: np.ndarray | None = None, counts=None
) -> Scenes:
    """Draw `num_scenes` scenes from the scans of `split`, all at once.

    `targets` and `counts` (S,) are drawn as well if not given.
    """
    scans, scan_digits = digit_scans(split)
    palette = np.array(list(COLORS.values()), dtype=np.float32)
    shape = (num_scenes, MAX_DIGITS)

    # The target digit occurs 0 to 3 times, each equally often; the others are distinct and different from it.
    names = rng.permuted(np.broadcast_to(np.arange(10), (num_scenes, 10)), axis=1)
    if targets is not None:  # move them to the front
        names[names == targets[:, None]] = names[:, 0]
        names[:, 0] = targets
    targets, others = names[:, 0], names[:, 1 : 1 + MAX_DIGITS]
    if counts is None:
        counts = rng.integers(0, 4, num_scenes)
    num_digits = rng.integers(4, MAX_DIGITS + 1, num_scenes)
    slot = np.arange(MAX_DIGITS)
    digits = np.where(slot < counts[:, None], targets[:, None], others)
    digits = np.where(slot < num_digits[:, None], digits, -1)
    digits = rng.permuted(digits, axis=1)
    present = digits >= 0

    rows = rng.permuted(np.broadcast_to(np.arange(GRID_SIZE), (num_scenes, GRID_SIZE)), axis=1)
    columns = rng.permuted(np.broadcast_to(np.arange(GRID_SIZE), (num_scenes, GRID_SIZE)), axis=1)
    rows, columns = rows[:, :MAX_DIGITS], columns[:, :MAX_DIGITS]
    colors = rng.integers(0, len(COLORS), shape)

    canvas = np.empty((num_scenes, CANVAS_SIZE, CANVAS_SIZE, 3), dtype=np.float32)
    canvas[:] = rng.uniform(10, 70, (num_scenes, 1, 1, 3))
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * 6

    def jittered(cells):
        return np.clip(
            cells * CELL_SIZE + rng.integers(-MAX_JITTER, MAX_JITTER + 1, cells.shape), 0, CANVAS_SIZE - CELL_SIZE
        )

    # Clutter goes into cells without a digit: the cells of digits get the largest keys.
    key = rng.random((num_scenes, GRID_SIZE * GRID_SIZE))
    np.put_along_axis(key, rows * GRID_SIZE + columns, np.where(present, 2.0, 1.5), axis=1)
    cells = np.argpartition(key, NUM_CLUTTER, axis=1)[:, :NUM_CLUTTER]
    patterns = _clutter_patterns()
    _stamp(
        canvas,
        patterns[rng.integers(0, len(patterns), cells.shape)],
        palette[rng.integers(0, len(palette), cells.shape)]
        * rng.uniform(0.5, 0.9, (*cells.shape, 1)).astype(np.float32),
        jittered(cells // GRID_SIZE),
        jittered(cells % GRID_SIZE),
    )

    # Draw a scan for each slot among the scans of its digit.
    by_digit = np.argsort(scan_digits, kind="stable")
    per_digit = np.bincount(scan_digits, minlength=10)
    first = np.concatenate([[0], np.cumsum(per_digit)[:-1]])
    kind = np.maximum(digits, 0)
    chosen = by_digit[first[kind] + (rng.random(shape) * per_digit[kind]).astype(np.int64)]
    ink = scans[chosen] * rng.uniform(0.85, 1.0, (*shape, 1, 1)).astype(np.float32) * present[..., None, None]
    _stamp(canvas, ink, palette[colors], jittered(rows), jittered(columns))

    images = np.clip(canvas, 0, 255).astype(np.uint8)
    return Scenes(images, digits, colors, rows, columns, targets, counts)


def _in_order(scenes: Scenes, index: int, direction: str) -> np.ndarray:
    """Return the slots of scene `index`'s digits, starting with the one furthest in `direction`."""
    axis, sign, _, _ = _DIRECTIONS[direction]
    slots = np.flatnonzero(scenes.digits[index] >= 0)
    return slots[np.argsort(sign * getattr(scenes, axis)[index, slots])]


def ask(scenes: Scenes, index: int, kind: str, rng: np.random.Generator) -> tuple[str, str]:
    """Return a question of `kind` about scene `index`, and its answer.

    Answers are balanced so that the question's words don't give the answer away: "exists" is yes half of the time,
    "count" is each of zero to three a quarter of the time, colours and digits are uniform.
    """
    if kind not in QUESTION_KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(QUESTION_KINDS)}.")
    digits = scenes.digits[index]
    if kind == "exists":
        answer = ("no", "yes")[rng.integers(2)]
        present = np.unique(digits[digits >= 0])
        about = DIGIT_NAMES[rng.choice(present if answer == "yes" else np.setdiff1d(np.arange(10), present))]
    elif kind == "count":
        about, answer = _plural(scenes.targets[index]), DIGIT_NAMES[scenes.counts[index]]
    else:
        direction = tuple(_DIRECTIONS)[rng.integers(4)]
        slots = _in_order(scenes, index, direction)
        unique = [slot for slot in slots if (digits == digits[slot]).sum() == 1]
        if kind == "extreme":
            about, answer = _DIRECTIONS[direction][2], DIGIT_NAMES[digits[slots[0]]]
        elif kind == "color":
            slot = unique[rng.integers(len(unique))]
            about, answer = DIGIT_NAMES[digits[slot]], COLOR_NAMES[scenes.colors[index, slot]]
        else:
            anchors = [slot for slot in unique if slot != slots[0]]
            if not anchors:  # the only digit that occurs once is the outermost: on its other side it has a neighbour
                direction = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[direction]
                slots, anchors = slots[::-1], unique
            anchor = anchors[rng.integers(len(anchors))]
            about = f"{_DIRECTIONS[direction][3]} the {DIGIT_NAMES[digits[anchor]]}"
            answer = DIGIT_NAMES[digits[slots[list(slots).index(anchor) - 1]]]
    return _QUESTIONS[kind][rng.integers(2)].format(about), answer


def describe(scenes: Scenes, index: int, direction: str) -> str:
    """Return a caption of scene `index`: its digits with their colours, read starting from side `direction`."""
    slots = _in_order(scenes, index, direction)
    words = " ".join(f"{COLOR_NAMES[scenes.colors[index, s]]} {DIGIT_NAMES[scenes.digits[index, s]]}" for s in slots)
    return f"from the {direction}: {words}"


def describe_from_all_sides(scenes: Scenes, index: int) -> list[str]:
    """Return four true captions of scene `index`: its digits read from the left, the right, the top and the bottom."""
    return [f"digits {describe(scenes, index, direction)}" for direction in _DIRECTIONS]


def draw_pairs(num_pairs: int, split: str, rng: np.random.Generator) -> tuple[Scenes, Scenes]:
    """Draw a left and a right scene for each of `num_pairs`, with the same target digit in both.

    The target is the digit that may occur several times. Its counts are equal in about two thirds of the pairs, so
    that statements about equal counts can be true.
    """
    targets = rng.integers(0, 10, num_pairs)
    left, right = rng.integers(0, 4, (2, num_pairs))
    right = np.where(rng.random(num_pairs) < 0.5, left, right)
    return draw_scenes(num_pairs, split, rng, targets, left), draw_scenes(num_pairs, split, rng, targets, right)


def _plural(digit: int) -> str:
    return DIGIT_NAMES[digit] + ("es" if digit == 6 else "s")


def _a(digit: int) -> str:
    return ("an " if digit == 8 else "a ") + DIGIT_NAMES[digit]


def state(left: Scenes, right: Scenes, index: int, kind: str, rng: np.random.Generator) -> tuple[str, bool]:
    """Return a statement of `kind` about pair `index` of two scenes, and whether it is true.

    The draw aims at true and false statements equally often.
    """
    truth = bool(rng.integers(2))
    pair = (left, right)
    if kind in ("extreme", "color"):
        side = rng.integers(2)
        scenes, where = pair[side], ("left", "right")[side]
        digits = scenes.digits[index]
        if kind == "extreme":
            direction = tuple(_DIRECTIONS)[rng.integers(4)]
            superlative = _DIRECTIONS[direction][2]
            digit = digits[_in_order(scenes, index, direction)[0]]
            if not truth:
                digit = rng.choice(np.setdiff1d(digits[digits >= 0], digit))
            return f"the {superlative} digit of the {where} image is {_a(digit)}", truth
        slot = rng.choice([slot for slot in np.flatnonzero(digits >= 0) if (digits == digits[slot]).sum() == 1])
        color = scenes.colors[index, slot]
        if not truth:
            color = (color + rng.integers(1, len(COLORS))) % len(COLORS)
        return f"the {DIGIT_NAMES[digits[slot]]} of the {where} image is {COLOR_NAMES[color]}", truth

    # Count each digit on either side, to find the digits for which the statement is true.
    here, there = ((scenes.digits[index][:, None] == np.arange(10)).sum(axis=0) for scenes in pair)
    names = ("left", "right")
    if kind in ("more", "only") and rng.integers(2):
        here, there, names = there, here, names[::-1]
    if kind == "total":
        totals = here + there
        digit = left.targets[index]
        stated = totals[digit]
        if not truth:
            stated = rng.choice([n for n in (stated - 2, stated - 1, stated + 1, stated + 2) if 0 <= n <= 6])
        return f"the images show {DIGIT_NAMES[stated]} {_plural(digit)} in all", truth
    true_of = {
        "more": here > there,
        "same": here == there,
        "both": (here > 0) & (there > 0),
        "only": (here > 0) & (there == 0),
        "neither": here + there == 0,
    }
    if kind not in true_of:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(STATEMENT_KINDS)}.")
    shown = (here + there > 0) | (kind == "neither")
    candidates = np.flatnonzero(shown & (true_of[kind] == truth))
    if len(candidates) == 0:
        truth = not truth
        candidates = np.flatnonzero(shown & (true_of[kind] == truth))
    target = left.targets[index]
    digit = target if target in candidates and rng.integers(2) else rng.choice(candidates)
    plural = _plural(digit)
    return {
        "more": f"the {names[0]} image has more {plural} than the {names[1]}",
        "same": f"both images have the same number of {plural}",
        "both": f"both images show {_a(digit)}",
        "only": f"only the {names[0]} image shows {_a(digit)}",
        "neither": f"neither image shows {_a(digit)}",
    }[kind], truth


def _question(scenes: Scenes, index: int, number: int, rng) -> dict:
    kind = QUESTION_KINDS[number % len(QUESTION_KINDS)]
    question, answer = ask(scenes, index, kind, rng)
    return {"image": Image.fromarray(scenes.images[index]), "question": question, "answer": answer, "kind": kind}


def _statement(pair: tuple[Scenes, Scenes], index: int, number: int, rng) -> dict:
    kind = STATEMENT_KINDS[number % len(STATEMENT_KINDS)]
    sentence, truth = state(*pair, index, kind, rng)
    left, right = (Image.fromarray(scenes.images[index]) for scenes in pair)
    return {"left_image": left, "right_image": right, "sentence": sentence, "label": int(truth), "kind": kind}


def _captions(scenes: Scenes, index: int, number: int, rng) -> dict:
    captions = describe_from_all_sides(scenes, index)
    return {"image": Image.fromarray(scenes.images[index]), "captions": captions, "image_id": str(number)}


# By kind of row: what is appended to the seed, how scenes are drawn, and how a row is made of them.
_KINDS: dict[str, tuple[tuple[int, ...], Callable, Callable]] = {
    "questions": ((), draw_scenes, _question),
    "statements": ((1,), draw_pairs, _statement),
    "images": ((2,), draw_scenes, _captions),
}


def _rows(kind: str, split: str, number: int, seed: int, source: str):
    more, draw, make = _KINDS[kind]
    rng = np.random.default_rng([seed, SPLITS[split], *more])
    chunk = 256  # small enough for the processor's cache
    for start in range(0, number, chunk):
        count = min(chunk, number - start)
        scenes = draw(count, split, rng)
        for index in range(count):
            yield make(scenes, index, start + index, rng)


def _imported(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"The digit scenes need {error.name}: pip install 'madtp_hf[digits]'.") from error


def _load(kind: str, split: str, number: int, seed: int, features: dict):
    """Return a `datasets.Dataset` of rows of a kind, cached by `datasets`."""
    datasets = _imported("datasets")
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}.")
    if number < 1:
        raise ValueError(f"num_{kind}={number}: expected at least 1.")
    # `datasets` identifies the generator by name and arguments only; the hash makes a changed module redraw scenes.
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    arguments = {"kind": kind, "split": split, "number": number, "seed": seed, "source": source}
    return datasets.Dataset.from_generator(_rows, features=datasets.Features(features), gen_kwargs=arguments)


def load_digit_questions(split: str, num_questions: int, seed: int = 0):
    """Return questions about digit scenes, one scene per question, as a `datasets.Dataset` that `datasets` caches.

    Args:
        split (`str`): `"train"`, `"validation"` or `"test"`: the split of the scans that the scenes are made of.
        num_questions (`int`): The number of rows; the kinds of question alternate.
        seed (`int`, *optional*, defaults to 0): Seed for drawing; the same split, number and seed give the same rows.

    Returns:
        `datasets.Dataset` with the columns `image` (80x80 RGB), `question`, `answer` and `kind`.
    """
    datasets = _imported("datasets")
    columns = {"image": datasets.Image(), **dict.fromkeys(("question", "answer", "kind"), datasets.Value("string"))}
    return _load("questions", split, num_questions, seed, columns)


def load_digit_statements(split: str, num_statements: int, seed: int = 0):
    """Return true and false statements about pairs of digit scenes, one pair per statement.

    Arguments are those of `load_digit_questions`.

    Returns:
        `datasets.Dataset` with the columns `left_image`, `right_image` (80x80 RGB), `sentence`, `label` (1 is true)
        and `kind`.
    """
    datasets = _imported("datasets")
    columns = {"left_image": datasets.Image(), "right_image": datasets.Image(), "sentence": datasets.Value("string")}
    columns |= {"label": datasets.ClassLabel(names=["False", "True"]), "kind": datasets.Value("string")}
    return _load("statements", split, num_statements, seed, columns)


def load_digit_captions(split: str, num_images: int, seed: int = 0):
    """Return digit scenes with four captions each; arguments are those of `load_digit_questions`.

    Returns:
        `datasets.Dataset` with the columns `image` (80x80 RGB), `captions` (list of strings) and `image_id`.
    """
    datasets = _imported("datasets")
    columns = {"image": datasets.Image(), "captions": [datasets.Value("string")], "image_id": datasets.Value("string")}
    return _load("images", split, num_images, seed, columns)


def question_only_accuracy(train, test, question: str = "question", answer: str = "answer") -> float:
    """Return the accuracy of the language-only baseline, which sees no image.

    It answers each question of `test` with the most frequent answer to the same words in `train`. Since there are few
    wordings and each recurs many times, no model can do better from the question alone.

    `question` and `answer` name the columns; for statements they are `"sentence"` and `"label"`.
    """
    answers: dict = defaultdict(Counter)
    for asked, answered in zip(train[question], train[answer]):
        answers[asked][answered] += 1
    likeliest = {asked: counter.most_common(1)[0][0] for asked, counter in answers.items()}
    right = [likeliest.get(asked) == answered for asked, answered in zip(test[question], test[answer])]
    return sum(right) / len(right)
