"""From rows to what the models take."""

import collections

import numpy as np
import pytest
import torch
from PIL import Image

from madtp_hf.data import CaptioningCollator, QuestionAnsweringCollator, RetrievalCollator, VisualReasoningCollator

from .conftest import make_task_model


def image(shade=0):
    return Image.fromarray(np.full((60, 80, 3), shade, dtype=np.uint8))


def ids_of(processor, text):
    return processor.tokenizer(text).input_ids


QUESTIONS = ["is there a seven?", "how many sevens are there of the color red?", "which digit?"]


def test_question_answering(processor):
    answers = ["yes", "three sevens", "no"]
    rows = [{"image": image(), "question": q, "answer": a} for q, a in zip(QUESTIONS, answers)]
    batch = QuestionAnsweringCollator(processor, 38)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "labels"}
    assert batch["pixel_values"].shape == (3, 3, 48, 48)
    for row in range(3):
        question, answer = ids_of(processor, QUESTIONS[row]), ids_of(processor, answers[row])
        assert batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist() == question
        labels = batch["labels"][row].tolist()
        assert labels == [38, *answer[1:]] + [-100] * (len(labels) - len(answer))
    make_task_model("vqa")(**batch).loss.backward()
    for row in rows:
        row.pop("answer")
    assert "labels" not in QuestionAnsweringCollator(processor, 38)(rows)
    short = QuestionAnsweringCollator(processor, 38, max_length=4)(rows)
    assert short["input_ids"].shape == (3, 4) and (short["input_ids"][:, -1] == 3).all()  # cut, but ended


def test_an_answer_is_drawn_as_often_as_it_was_given(processor):
    rows = [{"image": image(), "question": "how many?", "answers": ["two"] * 6 + ["three"] * 3 + ["one"]}] * 20
    collator = QuestionAnsweringCollator(processor, 38)
    drawn = collections.Counter()
    for _ in range(25):
        drawn.update(collator(rows)["labels"][:, 1].tolist())
    two, three, one = (drawn[ids_of(processor, word)[1]] / 500 for word in ("two", "three", "one"))
    assert two == pytest.approx(0.6, abs=0.07) and three == pytest.approx(0.3, abs=0.07)
    assert two + three + one == pytest.approx(1)
    # The draw is the seed's; one answer by itself goes before those of several people.
    first, again, other = (QuestionAnsweringCollator(processor, 38, seed=seed)(rows)["labels"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    single = QuestionAnsweringCollator(processor, 38)([{**rows[0], "answer": "one"}])
    assert single["labels"].tolist() == [[38, *ids_of(processor, "one")[1:]]]
    unnamed = QuestionAnsweringCollator(processor, 38)([{**rows[0], "answer": None}])
    assert unnamed["labels"].shape == (1, 3)


def test_visual_reasoning(processor):
    rows = [
        {"left_image": image(20 * row), "right_image": image(20 * row + 10), "sentence": sentence, "label": row % 2}
        for row, sentence in enumerate(["there are no sevens", "how many", "the left is red"])
    ]
    batch = VisualReasoningCollator(processor)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "labels"}
    assert batch["pixel_values"].shape == (3, 2, 3, 48, 48) and batch["labels"].tolist() == [0, 1, 0]
    brightness = batch["pixel_values"].mean((2, 3, 4)).flatten()  # left, right, left, right, ...
    assert (brightness.diff() > 0).all()
    make_task_model("nlvr2")(**batch).loss.backward()
    assert VisualReasoningCollator(processor, max_length=3)(rows)["input_ids"].shape == (3, 3)


CAPTIONS = [["a red seven"], ["two digit", "the color of three sevens"], ["no image"]]


def test_captioning(processor):
    rows = [{"image": image(), "captions": captions} for captions in CAPTIONS]
    prompt = "the image of"
    collator = CaptioningCollator(processor, 38, prompt=prompt)
    drawn = set()
    for _ in range(10):
        batch = collator(rows)
        assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "labels"}
        for row, captions in enumerate(CAPTIONS):
            texts = [[38, *ids_of(processor, f"{prompt} {caption}")[1:]] for caption in captions]
            ids = batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()
            assert ids in texts
            drawn.add(tuple(ids))
            labels = batch["labels"][row].tolist()
            assert labels == [-100] * 4 + ids[4:] + [-100] * (len(labels) - len(ids))  # start and prompt: 4 tokens
    assert len(drawn) == 4  # both captions of the second image
    model = make_task_model("captioning")
    model(**batch).loss.backward()
    # What is learned goes on from what `generate` is given.
    generated = model.generate(batch["pixel_values"], collator.prompt_ids(3), max_new_tokens=1)
    assert torch.equal(generated[:, :4], batch["input_ids"][:, :4])
    bare = CaptioningCollator(processor, 38, prompt="")
    batch = bare(rows)
    assert (batch["labels"][:, 0] == -100).all() and (batch["labels"][:, 1] == batch["input_ids"][:, 1]).all()
    assert model.generate(batch["pixel_values"], bare.prompt_ids(3), max_new_tokens=1).shape == (3, 2)
    assert CaptioningCollator(processor, 38, prompt=prompt, max_length=5)(rows)["input_ids"].shape == (3, 5)


def test_retrieval(processor):
    names = ["COCO_1", "COCO_2", "COCO_1", "17"]
    rows = [
        {"image": image(), "captions": captions, "image_id": name}
        for captions, name in zip([*CAPTIONS, ["a seven"]], names)
    ]
    batch = RetrievalCollator(processor)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "image_ids", "return_loss"}
    assert batch["return_loss"] is True
    ids = batch["image_ids"]
    assert ids.dtype == torch.int64 and ids.shape == (4,) and (ids >= 0).all()  # -1 is a free place of the queues
    assert ids[0] == ids[2] and len(set(ids.tolist())) == 3
    assert torch.equal(RetrievalCollator(processor, seed=5)(rows[::-1])["image_ids"], ids.flip(0))
    for row in (0, 2, 3):
        text = batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()
        assert text == ids_of(processor, rows[row]["captions"][0])
    collator = RetrievalCollator(processor)
    drawn = {tuple(collator(rows[1:2])["input_ids"][0].tolist()) for _ in range(20)}
    assert drawn == {tuple(ids_of(processor, caption)) for caption in CAPTIONS[1]}
    make_task_model("retrieval")(**batch).loss.backward()


@pytest.mark.parametrize("padding_side", ("left", "right"))
def test_a_decoders_padding_is_behind_the_text(processor, padding_side):
    processor.tokenizer.padding_side = padding_side
    rows = [{"image": image(), "captions": captions} for captions in (["a"], ["a red seven"])]
    batch = CaptioningCollator(processor, 38)(rows)
    assert (batch["input_ids"][:, 0] == 38).all() and (batch["attention_mask"].diff(dim=1) <= 0).all()
    rows = [{"image": image(), "question": "how many?", "answer": answer} for answer in ("a", "a red seven")]
    assert (QuestionAnsweringCollator(processor, 38)(rows)["labels"][:, 0] == 38).all()


@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=["0", "2", "2 persistent"]
)
def test_epochs_draw_anew_also_in_workers_and_one_by_one(options, processor):
    """Most workers begin anew every epoch and can't know what they have drawn before; others keep their seed."""
    rows = [{"image": image(), "question": "is there a seven?", "answers": ["one", "two", "three", "seven"]}] * 2

    def draw():
        torch.manual_seed(0)
        collator = QuestionAnsweringCollator(processor, 38)
        loader = torch.utils.data.DataLoader(rows, batch_size=1, collate_fn=collator, **options)
        return [batch["labels"].tolist() for _ in range(5) for batch in loader]

    drawn = draw()
    assert drawn == draw()
    for worker in range(2):  # each has a row of its own in every epoch
        assert len({str(labels) for labels in drawn[worker::2]}) > 1
