import collections

import numpy as np
import pytest

from madtp_hf.data import QuestionAnsweringCollator, load_digit_questions
from madtp_hf.data import digit_scenes as ds


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def read(scenes, index):
    """The digits of a scene with their places, as a list of (row, column, digit, colour)."""
    present = scenes.digits[index] >= 0
    return list(
        zip(*(getattr(scenes, name)[index][present].tolist() for name in ("rows", "columns", "digits", "colors")))
    )


PLURALS = {**{f"{name}s": name for name in ds.DIGIT_NAMES}, "sixes": "six"}


def answer_by_hand(digits, kind, question):
    words = question.rstrip("?").split()
    names = [PLURALS.get(word, word) for word in words if PLURALS.get(word, word) in ds.DIGIT_NAMES]
    if kind in ("exists", "count"):
        count = sum(ds.DIGIT_NAMES[digit] == names[0] for _, _, digit, _ in digits)
        return ds.DIGIT_NAMES[count] if kind == "count" else ("yes" if count else "no")
    if kind == "color":
        (color,) = [color for _, _, digit, color in digits if ds.DIGIT_NAMES[digit] == names[0]]
        return ds.COLOR_NAMES[color]
    if kind == "extreme":
        word = next(word for word in words if word.endswith("most"))
        axis, choose = {"left": (1, min), "right": (1, max), "top": (0, min), "bottom": (0, max)}[word[:-4]]
        return ds.DIGIT_NAMES[choose(digits, key=lambda d: d[axis])[2]]
    (anchor,) = [d for d in digits if ds.DIGIT_NAMES[d[2]] == names[-1]]
    axis, side = next(
        value
        for word, value in {"left": (1, -1), "right": (1, 1), "above": (0, -1), "below": (0, 1)}.items()
        if word in words
    )
    beyond = [d for d in digits if (d[axis] - anchor[axis]) * side > 0]
    return ds.DIGIT_NAMES[min(beyond, key=lambda d: abs(d[axis] - anchor[axis]))[2]]


def test_answers_are_true():
    rng = np.random.default_rng(0)
    scenes = ds.draw_scenes(400, "train", rng)
    for index in range(len(scenes)):
        digits = read(scenes, index)
        assert len({row for row, *_ in digits}) == len({column for _, column, *_ in digits}) == len(digits)
        for kind in ds.QUESTION_KINDS:
            question, answer = ds.ask(scenes, index, kind, rng)
            assert answer == answer_by_hand(digits, kind, question), question
        caption = ds.describe(scenes, index, "left")
        expected = [f"{ds.COLOR_NAMES[c]} {ds.DIGIT_NAMES[d]}" for _, _, d, c in sorted(digits, key=lambda d: d[1])]
        assert caption == "from the left: " + " ".join(expected)


def test_the_questions_words_do_not_give_the_answer_away():
    rng = np.random.default_rng(0)
    scenes = ds.draw_scenes(4000, "train", rng)
    likeliest = {}
    for kind in ds.QUESTION_KINDS:
        by_question = collections.defaultdict(collections.Counter)
        for index in range(len(scenes)):
            question, answer = ds.ask(scenes, index, kind, rng)
            by_question[question][answer] += 1
        best = sum(counter.most_common(1)[0][1] for counter in by_question.values())
        likeliest[kind] = best / len(scenes)
    # Above chance by no more than what so few questions of a wording show by luck.
    assert likeliest["exists"] < 0.56 and likeliest["count"] < 0.33 and likeliest["color"] < 0.28
    assert likeliest["extreme"] < 0.16 and likeliest["neighbor"] < 0.24


def test_no_scan_is_in_two_splits():
    scans = {split: ds.digit_scans(split) for split in ds.SPLITS}
    assert sum(len(digits) for _, digits in scans.values()) == 1797
    for split, (_, digits) in scans.items():
        assert set(digits.tolist()) == set(range(10)), split
    from sklearn.datasets import load_digits

    everything = collections.Counter((image / 16).astype(np.float32).tobytes() for image in load_digits().images)
    parts = sum(
        (collections.Counter(image.tobytes() for image in images) for images, _ in scans.values()),
        collections.Counter(),
    )
    assert parts == everything


def test_most_of_a_scene_holds_no_digit():
    scenes = ds.draw_scenes(100, "test", np.random.default_rng(0))
    assert ((scenes.digits >= 0).sum(1) <= 5).all() and ds.GRID_SIZE**2 == 100
    assert scenes.images.shape == (100, 80, 80, 3) and scenes.images.dtype == np.uint8


def test_a_dataset_is_the_same_for_the_same_seed():
    first = load_digit_questions("test", 40, seed=1)
    again = load_digit_questions("test", 40, seed=1)
    other = load_digit_questions("test", 40, seed=2)
    assert first.column_names == ["image", "question", "answer", "kind"] and len(first) == 40
    assert first["question"][:] == again["question"][:] != other["question"][:]
    assert np.array_equal(np.asarray(first[3]["image"]), np.asarray(again[3]["image"]))
    assert first[0]["image"].size == (80, 80) and set(first["kind"]) == set(ds.QUESTION_KINDS)


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="unknown split 'dev': expected one of train"):
        load_digit_questions("dev", 10)
    with pytest.raises(ValueError, match="num_questions=0"):
        load_digit_questions("test", 0)


def test_the_collator_makes_what_the_model_takes(model, processor):
    rows = [
        {"image": row["image"], "question": "is there a seven?" if i else "how many are there?", "answer": "yes"}
        for i, row in enumerate(load_digit_questions("test", 3))
    ]
    batch = QuestionAnsweringCollator(processor, 38)(rows)
    assert batch["pixel_values"].shape == (3, 3, 48, 48)
    assert (batch["labels"][:, 0] == 38).all() and batch["labels"][0].tolist()[-1] == 3
    model(**batch).loss.backward()
