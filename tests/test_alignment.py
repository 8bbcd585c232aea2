"""Alignment tokens from data."""

import pytest
import torch

from madtp_hf import calibrate, init_alignment_from

from .conftest import TASKS, make_task_model
from .helpers.clip import make_clip_inputs, make_clip_model


WITH_TEXT = [name for name in TASKS if name != "captioning"]


def batches_of(task):
    return [TASKS[task].make_inputs((9, 5, 7, 12), seed=seed) for seed in range(3)]


@pytest.mark.parametrize("task", WITH_TEXT)
def test_the_same_data_give_the_same_tokens_whatever_was_there_before(task):
    made = []
    for training in (False, True):
        model = make_task_model(task)
        with torch.no_grad():
            model.alignment.tokens.normal_()
        model.train(training)
        init_alignment_from(model, batches_of(task))
        assert model.training == training and not model.is_pruning
        made.append(model.alignment.tokens.detach().clone())
    assert torch.equal(*made) and made[0].isfinite().all()
    assert made[0].std(dim=0).min() > 0  # they differ
    calibrate(model, batches_of(task), [0.1, 0.3])
    model.set_pruning(reduction=0.1)


def test_labels_and_padding_do_not_matter():
    model, tokens = make_task_model("vqa"), []
    for more in (0, 3):
        batches = batches_of("vqa")
        for batch in batches:
            del batch["labels"]
            for name in ("input_ids", "attention_mask"):
                batch[name] = torch.nn.functional.pad(batch[name], (0, more))
        init_alignment_from(model, batches)
        tokens.append(model.alignment.tokens.detach().clone())
    torch.testing.assert_close(*tokens, atol=1e-4, rtol=0)


def test_a_schedule_of_other_tokens_is_dropped():
    model = make_task_model("vqa")
    model.config.pruning_schedule = [[0.3, 1.0]]
    model.set_pruning(reduction=0.3)
    init_alignment_from(model, batches_of("vqa"))
    assert model.config.pruning_schedule is None and not model.is_pruning


def test_tokens_of_a_width_of_their_own():
    model = make_task_model("vqa", {"alignment_dim": 20})
    init_alignment_from(model, batches_of("vqa"))
    assert model.alignment.tokens.shape[1] == 20 and model.alignment.tokens.isfinite().all()


def test_what_has_no_words_is_named():
    with pytest.raises(ValueError, match="has no text encoder"):
        init_alignment_from(make_task_model("captioning"), batches_of("captioning"))
    model = make_task_model("vqa")
    before = model.alignment.tokens.detach().clone()
    with pytest.raises(ValueError, match="expected batches with some words"):
        init_alignment_from(model, [])
    assert torch.equal(model.alignment.tokens, before)


@torch.no_grad()
def test_clips_tokens_are_its_words_as_each_layer_maps_them():
    """With a single token it is their mean; start, end and padding take no part."""
    model, inputs = make_clip_model({"num_alignment_tokens": 1}), make_clip_inputs((9, 5, 7), width=12)
    states = model.get_text_features(inputs["input_ids"], output_hidden_states=True)
    words = [
        projection(of_layer[row, 1 : length - 1])
        for projection, of_layer in zip(model.alignment.text_projection, states.hidden_states)
        for row, length in enumerate((9, 5, 7))
    ]
    init_alignment_from(model, [inputs])
    torch.testing.assert_close(model.alignment.tokens[0], torch.cat(words).mean(dim=0), atol=1e-5, rtol=1e-5)
    assert not model.is_pruning
