"""Bad input to a model is an error that names what was given and what was expected."""

import pytest
import torch
import torch.nn.functional as F

from .conftest import TASKS, make_inputs, make_task_model


def change(**changes):
    """A function of the inputs: those with some of them changed, given as functions of what they were."""
    return lambda inputs: {**inputs, **{name: f(inputs.get(name)) for name, f in changes.items()}}


EVERYWHERE = [
    (change(pixel_values=lambda p: p[..., :1, :, :]), r"1, 48, 48\).*expected \(batch_size, 3"),
    (change(pixel_values=lambda p: p[..., :40, :]), "40 x 48 pixels.*takes 48 x 48"),
    (change(pixel_values=lambda p: p[:2]), "3 (questions|captions|sentences|texts) and pixel_values 2 images"),
    (change(attention_mask=lambda m: m[:, :4]), r"\(3, 4\) and input_ids \(3, 9\)"),
    (change(attention_mask=lambda m: m * torch.tensor([[1], [0], [1]])), r"0 everywhere in row \[1\]"),
]
OWN = {
    "vqa": [
        (change(pixel_values=lambda p: p[0]), r"\(3, 48, 48\).*expected \(batch_size, 3"),
        (change(labels=lambda given: given[:2]), "2 answers for 3 questions"),
        (change(labels=lambda _: None), "Neither labels nor decoder_input_ids"),
    ],
    "captioning": [
        (change(pixel_values=lambda p: p[0]), r"\(3, 48, 48\).*expected \(batch_size, 3"),
        (change(labels=lambda _: None, input_ids=lambda _: None), "input_ids is missing"),
        (change(labels=lambda given: given[:, :5]), r"labels.*\(3, 5\).*\(3, 9\)"),
        (change(labels=lambda given: given[:2]), r"labels.*\(2, 9\).*\(3, 9\)"),
    ],
    "nlvr2": [
        (change(pixel_values=lambda p: p[:, 0]), r"\(3, 3, 48, 48\): expected \(batch_size, 2, 3"),
        (change(pixel_values=lambda p: p[:, [0, 1, 0]]), r"\(3, 3, 3, 48, 48\): expected \(batch_size, 2, 3"),
        (change(pixel_values=lambda p: p[:, :1]), r"\(3, 1, 3, 48, 48\): expected \(batch_size, 2, 3"),
        (change(labels=lambda given: given[:2]), r"labels has shape \(2,\): expected \(3,\)"),
        (change(labels=lambda given: F.one_hot(given)), r"labels has shape \(3, 2\): expected \(3,\)"),
        (change(labels=lambda given: given + 1), r"labels holds \[1, 2\]: expected 1 .* and 0 "),
        (change(labels=lambda given: given - 1), r"labels holds \[-1, 0\]: expected 1 .* and 0 "),
    ],
    "retrieval": [
        (
            change(pixel_values=lambda p: p[0], use_itm_head=lambda _: False),
            r"\(3, 48, 48\).*expected \(batch_size, 3",
        ),
        (change(return_loss=lambda _: True, image_ids=lambda _: torch.zeros(3).long()), "All 3 samples.*one image"),
        (
            change(return_loss=lambda _: True, image_ids=lambda _: torch.arange(2)),
            r"image_ids has shape \(2,\).*\(3,\)",
        ),
        (
            lambda inputs: {"return_loss": True, **{name: value[:1] for name, value in inputs.items()}},
            "All 1 samples.*one image",
        ),
    ],
}


@pytest.mark.parametrize("temperature", (0.0, 3.0))
@pytest.mark.parametrize("task, change, message", [(task, *case) for task in TASKS for case in EVERYWHERE + OWN[task]])
def test_bad_input_is_named(task, change, message, temperature):
    model = make_task_model(task)
    model.set_pruning(temperature=temperature)
    with pytest.raises(ValueError, match=message):
        model(**change(TASKS[task].make_inputs()))


@pytest.mark.parametrize("task", TASKS)
def test_texts_that_are_too_long_are_named(task):
    model = make_task_model(task)
    remedy = "" if task == "captioning" else ".*truncation=True"
    with pytest.raises(ValueError, match=rf"25 tokens.*at most 24{remedy}"):
        model(**TASKS[task].make_inputs((9, 25, 7)))


def test_bad_input_to_the_features_and_to_generate_is_named():
    retrieval, captioning = make_task_model("retrieval"), make_task_model("captioning")
    inputs = make_inputs((9, 25, 7))
    with pytest.raises(ValueError, match=r"25 tokens.*at most 24"):
        retrieval.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    with pytest.raises(ValueError, match=r"40 x 48 pixels.*takes 48 x 48"):
        retrieval.get_image_features(inputs["pixel_values"][:, :, :40])
    with pytest.raises(ValueError, match="2 prompts and pixel_values 3 images"):
        captioning.generate(inputs["pixel_values"], torch.tensor([[2, 11, 3]] * 2))
    with pytest.raises(ValueError, match=r"expected \(batch_size, 3"):
        captioning.generate(inputs["pixel_values"][:, :1])
