import collections

import numpy as np
import pytest

from madtp_hf.data import (
    QuestionAnsweringCollator,
    load_digit_captions,
    load_digit_questions,
    load_digit_statements,
    question_only_accuracy,
)
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


def truth_by_hand(left, right, kind, sentence):
    """Whether a statement about two scenes, lists as of `read`, is true."""
    words = sentence.split()
    names = [PLURALS.get(word, word) for word in words if PLURALS.get(word, word) in ds.DIGIT_NAMES]
    if kind in ("extreme", "color"):
        # "the leftmost digit of the right image is a seven", "the seven of the right image is blue"
        digits = {"left": left, "right": right}[words[words.index("image") - 1]]
        question = f"which digit is {words[1]}?" if kind == "extreme" else f"what color is the {words[1]}?"
        return answer_by_hand(digits, kind, question) == words[-1]
    here, there = (sum(ds.DIGIT_NAMES[digit] == names[-1] for _, _, digit, _ in side) for side in (left, right))
    if kind == "total":
        return here + there == ds.DIGIT_NAMES.index(names[0])
    if kind in ("more", "only") and words[1 if kind == "more" else 2] == "right":
        here, there = there, here
    return {
        "more": here > there,
        "same": here == there,
        "both": here > 0 and there > 0,
        "only": here > 0 and there == 0,
        "neither": here == 0 and there == 0,
    }[kind]


def test_statements_are_true_where_they_say_so():
    rng = np.random.default_rng(0)
    left, right = ds.draw_pairs(500, "train", rng)
    assert (left.targets == right.targets).all() and 0.5 < (left.counts == right.counts).mean() < 0.75
    for kind in ds.STATEMENT_KINDS:
        truths = []
        for index in range(len(left)):
            sentence, truth = ds.state(left, right, index, kind, rng)
            assert truth_by_hand(read(left, index), read(right, index), kind, sentence) == truth, (sentence, truth)
            truths.append(truth)
        assert 0.35 < np.mean(truths) < 0.65, kind
        assert type(truth) is bool
    with pytest.raises(ValueError, match="'fewer': expected one of more, same"):
        ds.state(left, right, 0, "fewer", rng)


def test_a_data_set_of_statements():
    statements = load_digit_statements("validation", 300, seed=1)
    assert statements.column_names == ["left_image", "right_image", "sentence", "label", "kind"]
    assert list(statements["kind"][:8]) == list(ds.STATEMENT_KINDS)
    # Which scenes its images show, drawn again: they are what the sentences are about.
    rng = np.random.default_rng([1, ds.SPLITS["validation"], 1])
    left, right = ds.draw_pairs(256, "validation", rng)
    for index in range(0, 256, 5):
        row = statements[index]
        assert np.array_equal(np.asarray(row["left_image"]), left.images[index])
        assert np.array_equal(np.asarray(row["right_image"]), right.images[index])
        truth = truth_by_hand(read(left, index), read(right, index), row["kind"], row["sentence"])
        assert row["label"] == int(truth), row["sentence"]
    assert 0.35 < np.mean(statements["label"][:]) < 0.65
    again, other = (load_digit_statements("validation", 300, seed=seed)["sentence"][:] for seed in (1, 2))
    assert again == statements["sentence"][:] != other
    with pytest.raises(ValueError, match="num_statements=0"):
        load_digit_statements("test", 0)


def test_a_data_set_of_captions():
    captions = load_digit_captions("validation", 300, seed=1)
    assert captions.column_names == ["image", "captions", "image_id"]
    assert len(set(captions["image_id"][:])) == 300
    scenes = ds.draw_scenes(256, "validation", np.random.default_rng([1, ds.SPLITS["validation"], 2]))
    for index in range(0, 256, 5):
        row = captions[index]
        assert np.array_equal(np.asarray(row["image"]), scenes.images[index])
        expected = []
        for name, axis, sign in (("left", 1, 1), ("right", 1, -1), ("top", 0, 1), ("bottom", 0, -1)):
            in_order = sorted(read(scenes, index), key=lambda place: sign * place[axis])
            words = [f"{ds.COLOR_NAMES[color]} {ds.DIGIT_NAMES[digit]}" for _, _, digit, color in in_order]
            expected.append(f"digits from the {name}: {' '.join(words)}")
        assert row["captions"] == expected


def test_the_statements_words_do_not_give_the_truth_away():
    rng = np.random.default_rng(0)
    left, right = ds.draw_pairs(1500, "train", rng)
    right_by_words = {}
    for kind in ds.STATEMENT_KINDS:
        rows = [ds.state(left, right, index, kind, rng) for index in range(1500)]
        halves = (dict(zip(("sentence", "label"), zip(*part))) for part in (rows[:750], rows[750:]))
        right_by_words[kind] = question_only_accuracy(*halves, "sentence", "label")
    # Of totals, those in the middle are true a little more often than those that hardly occur.
    assert right_by_words.pop("total") < 0.66
    assert max(right_by_words.values()) < 0.6 and np.mean(list(right_by_words.values())) < 0.54, right_by_words


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
    with pytest.raises(ValueError, match="split='dev': expected one of train"):
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
