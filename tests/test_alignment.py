"""Alignment tokens from data."""

import pytest
import torch

from madtp_hf import calibrate, init_alignment_from
from madtp_hf.budgets.alignment import _Recording

from .conftest import TASKS, make_task_model
from .helpers.clip import make_clip_inputs, make_clip_model


def batches_of(task):
    return [TASKS[task].make_inputs((9, 5, 7, 12), seed=seed) for seed in range(3)]


@pytest.mark.parametrize("task", TASKS)
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


def test_what_has_nothing_to_look_at_is_named():
    model = make_task_model("vqa")
    before = model.alignment.tokens.detach().clone()
    with pytest.raises(ValueError, match="expected batches as the model takes them"):
        init_alignment_from(model, [])
    assert torch.equal(model.alignment.tokens, before)
    assert model.config.pruning_method == "madtp" and not model.is_pruning


def test_patches_that_are_attended_to_become_the_important_ones():
    """The importance of patches is nearer to the class token's attention than with random tokens."""
    model, batches = make_task_model("captioning"), batches_of("captioning")
    recording = _Recording(model)
    with torch.no_grad():
        recording.run(batches)
    by_self, by_class = torch.cat(recording.attention, dim=2).unbind(1)
    patches = torch.cat(recording.patches, dim=1)

    def distance():
        strongest = (patches @ model.alignment.tokens.T).amax(dim=-1).detach()
        by_alignment = strongest / strongest.sum(dim=-1, keepdim=True)
        return ((by_self + by_class + by_alignment) / 3 - by_class / by_class.sum(dim=-1, keepdim=True)).abs().mean()

    init_alignment_from(model, batches)
    fitted = distance()
    with torch.no_grad():
        model.alignment.tokens.normal_()
    assert fitted < 0.9 * distance()


def test_clips_tokens_come_from_images_and_words_as_each_layer_maps_them():
    model, inputs = make_clip_model(), make_clip_inputs((9, 5, 7), width=12)
    before = model.alignment.tokens.detach().clone()
    init_alignment_from(model, [inputs])
    tokens = model.alignment.tokens
    assert tokens.isfinite().all() and not torch.equal(tokens, before) and not model.is_pruning
    with torch.no_grad():  # as important as one another, the words
        states = model.get_text_features(inputs["input_ids"], output_hidden_states=True).hidden_states
        maps = model.alignment.text_projection
        words = torch.cat([maps[layer](states[layer][0, 1:8]) for layer in range(len(maps))])
    spread = [
        (words @ some.T).amax(dim=-1).std() / (words @ some.T).amax(dim=-1).abs().mean() for some in (before, tokens)
    ]
    assert spread[1] < spread[0]
