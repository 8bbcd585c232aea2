"""Rows as people have them: image files, rows without answers, and what `Trainer` makes of them."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from madtp_hf.data import CaptioningCollator, QuestionAnsweringCollator, RetrievalCollator, VisualReasoningCollator

from .conftest import make_task_model


QUESTIONS = ("is there a seven?", "how many sevens are there?", "which digit?")


def picture(seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 70, 3), dtype=np.uint8))


def question_rows(**columns) -> list[dict]:
    """Three rows; each of the columns has three values."""
    rows = [{"image": picture(), "question": question} for question in QUESTIONS]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return rows


def pair_rows(labels=(None, None, None)) -> list[dict]:
    rows = [{"left_image": picture(1), "right_image": picture(2), "sentence": sentence} for sentence in QUESTIONS]
    return [row if label is None else {**row, "label": label} for row, label in zip(rows, labels, strict=True)]


@pytest.fixture
def turned(tmp_path):
    """A photograph as cameras store it: lying on its side, with a note of how to turn it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    picture().save(path, exif=exif)
    return path


CAPTION_ROWS = [{"image": picture(), "captions": ["a seven"], "image_id": "1"}] * 2


@pytest.mark.parametrize(
    "task, make_collator, rows, column",
    [
        (
            "vqa",
            lambda processor: QuestionAnsweringCollator(processor, 38),
            question_rows(answer=["yes"] * 3),
            "question",
        ),
        ("nlvr2", VisualReasoningCollator, pair_rows((0, 1, 1)), "sentence"),
        ("captioning", lambda processor: CaptioningCollator(processor, 38), CAPTION_ROWS, "captions"),
        ("retrieval", RetrievalCollator, CAPTION_ROWS, "image_id"),
    ],
)
def test_columns_that_trainer_removed_are_named(task, make_collator, rows, column, processor, tmp_path):
    def first_batch(**options):
        arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)
        collator = make_collator(processor)
        trainer = Trainer(make_task_model(task), arguments, data_collator=collator, train_dataset=rows)
        return next(iter(trainer.get_train_dataloader()))

    with pytest.raises(ValueError, match=f"Row 0 .* no '{column}'.*remove_unused_columns=False"):
        first_batch()
    assert "pixel_values" in first_batch(remove_unused_columns=False)


def test_a_file_is_read_as_the_pipeline_reads_it(processor, turned):
    ask = make_task_model("vqa").as_pipeline(processor)
    expected = ask.preprocess({"image": str(turned), "question": QUESTIONS[0]})["pixel_values"]
    upright = picture().transpose(Image.Transpose.ROTATE_270)  # what the note asks for
    with Image.open(turned) as opened:
        for image in (str(turned), turned, opened, upright, np.array(upright)):
            rows = [{"image": image, "question": QUESTIONS[0], "captions": ["a seven"], "image_id": "1"}]
            for collator in (QuestionAnsweringCollator(processor, 38), RetrievalCollator(processor)):
                torch.testing.assert_close(collator(rows)["pixel_values"], expected, atol=0, rtol=0)
            rows = [{"left_image": image, "right_image": picture(), "sentence": QUESTIONS[0]}]
            pair = VisualReasoningCollator(processor)(rows)["pixel_values"]
            torch.testing.assert_close(pair[:, 0], expected, atol=0, rtol=0)


def test_a_grey_file_becomes_rgb(processor, tmp_path):
    picture().convert("L").save(tmp_path / "grey.png")
    rows = [{"image": tmp_path / "grey.png", "question": QUESTIONS[0]}]
    assert QuestionAnsweringCollator(processor, 38)(rows)["pixel_values"].shape == (1, 3, 48, 48)


@pytest.mark.parametrize(
    "image, message",
    [
        ("missing.png", "Row 1 .*'image': The image missing.png can't be read: no such file"),
        ("https://127.0.0.1:9/image.png", "Row 1 .*no such file"),  # a collator fetches nothing
        (5, "Row 1 .*The image is a int: expected a path"),
        (np.zeros((3, 40, 40), dtype=np.uint8), r"Row 1 .*shape \(3, 40, 40\).*expected \(height, width, 3\)"),
        (np.zeros((40, 40, 3)), "Row 1 .*float64.*uint8"),
        (None, "Row 1 .*None as 'image'"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(processor, image, message):
    rows = question_rows()
    rows[1]["image"] = image
    with pytest.raises(ValueError, match=message):
        QuestionAnsweringCollator(processor, 38)(rows)


def test_a_file_that_holds_no_image_is_named(processor, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    rows = question_rows()
    rows[2]["image"] = tmp_path / "text.png"
    with pytest.raises(ValueError, match=r"Row 2 .*text.png.* can't be read"):
        QuestionAnsweringCollator(processor, 38)(rows)


@pytest.mark.parametrize(
    "columns",
    [
        {"answer": ["yes", "", "no"]},
        {"answer": ["yes", None, "no"]},
        {"answer": ["yes", "  ", "no"]},
        {"answer": ["yes", 5, "no"]},
        {"answers": [["yes", "no"], [], ["no"]]},
        {"answers": [["yes", "no"], [""], ["no"]]},
    ],
)
def test_a_row_without_answer_is_named(processor, columns):
    rows = question_rows(**columns)
    with pytest.raises(ValueError, match=r"Row 1 .*'how many sevens are there\?'.* has no answer"):
        QuestionAnsweringCollator(processor, 38)(rows)
    del rows[1]
    assert len(QuestionAnsweringCollator(processor, 38)(rows)["labels"]) == 2


def test_an_empty_answer_by_itself_is_named(processor):
    """A batch of one such row is no batch to predict for."""
    with pytest.raises(ValueError, match=r"Row 0 .*has no answer"):
        QuestionAnsweringCollator(processor, 38)(question_rows(answer=["", "", ""])[:1])
    for columns in ({}, {"answer": [None] * 3}, {"answers": [[]] * 3}):
        assert "labels" not in QuestionAnsweringCollator(processor, 38)(question_rows(**columns))


def test_a_string_is_one_answer_or_caption_not_its_letters(processor):
    rows = question_rows(answers=["seven", "seven", "seven"])
    assert QuestionAnsweringCollator(processor, 38)(rows)["labels"].shape == (3, 3)
    rows = [{"image": picture(), "captions": "seven", "image_id": "1"}]
    seven = processor.tokenizer("seven").input_ids
    assert RetrievalCollator(processor)(rows)["input_ids"].tolist() == [seven]
    assert CaptioningCollator(processor, 38, prompt="")(rows)["input_ids"][0, 1:].tolist() == seven[1:]


def test_a_row_without_captions_is_named(processor):
    rows = [{"image": picture(), "captions": captions, "image_id": "1"} for captions in (["a seven"], [])]
    for collator in (RetrievalCollator(processor), CaptioningCollator(processor, 38)):
        with pytest.raises(ValueError, match=r"Row 1 of the batch .*at least one"):
            collator(rows)


def test_visual_reasoning_without_labels(processor):
    batch = VisualReasoningCollator(processor)(pair_rows())
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    with torch.no_grad():
        assert make_task_model("nlvr2")(**batch).logits.shape == (3, 2)


@pytest.mark.parametrize("label", (None, -1, "True", 0.5))
def test_a_row_without_a_usable_label_is_named(processor, label):
    with pytest.raises(ValueError, match=r"Row 1 .*'how many sevens are there\?'.* has the label"):
        VisualReasoningCollator(processor)(pair_rows((1, label, 0)))
    assert VisualReasoningCollator(processor)(pair_rows((True, 0, 1)))["labels"].tolist() == [1, 0, 1]
