"""The towers and the features, called as transformers' are; images that are encoded once for several calls."""

import copy
import gc
import inspect

import pytest
import torch
import torch.nn.functional as F

from .conftest import TASKS, close, make_inputs, make_task_blip, make_task_model
from .helpers.clip import make_clip, make_clip_inputs, make_clip_model


TASK = pytest.mark.parametrize("task", TASKS)
GENERATING = pytest.mark.parametrize("task", ["vqa", "captioning"])
TEMPERATURE = pytest.mark.parametrize("temperature", [0.0, 3.0])


def with_pruning(model, temperature):
    model.set_pruning(temperature=temperature)
    return model


@TASK
@torch.no_grad()
def test_the_vision_tower_returns_what_transformers_does(task):
    pixel_values = make_inputs()["pixel_values"]
    options = {"pixel_values": pixel_values, "output_hidden_states": True}
    mine, theirs = (m.vision_model(**options) for m in (make_task_model(task), make_task_blip(task)))
    assert list(mine.keys()) == list(theirs.keys())
    close(mine[0], theirs[0])
    close(mine.pooler_output, theirs.pooler_output)
    for ours, stock in zip(mine.hidden_states[:-1], theirs.hidden_states[:-1], strict=True):
        close(ours, stock)
    in_a_tuple = make_task_model(task).vision_model(pixel_values, return_dict=False)
    assert type(in_a_tuple) is tuple and in_a_tuple[0].equal(mine.last_hidden_state)


@pytest.mark.parametrize("with_image", [False, True])
@torch.no_grad()
def test_the_text_tower_returns_what_transformers_does(with_image):
    inputs = make_inputs()
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    model, blip = make_task_model("vqa"), make_task_blip("vqa")
    if with_image:
        text["encoder_hidden_states"] = blip.vision_model(inputs["pixel_values"])[0]
    mine, theirs = model.text_encoder(**text), blip.text_encoder(**text)
    assert list(mine.keys()) == list(theirs.keys())
    close(mine[0], theirs[0])


@torch.no_grad()
def test_clips_towers_return_what_transformers_do():
    inputs, model, clip = make_clip_inputs(), make_clip_model(), make_clip()
    pairs = [
        (m.text_model(inputs["input_ids"], inputs["attention_mask"]), m.vision_model(inputs["pixel_values"]))
        for m in (model, clip)
    ]
    for mine, theirs in zip(*pairs, strict=True):
        assert list(mine.keys()) == list(theirs.keys())
        close(mine.pooler_output, theirs.pooler_output)
    close(pairs[0][1][0], pairs[1][1][0])


@TASK
@torch.no_grad()
def test_a_pruned_tower_puts_real_tokens_first_and_returns_their_mask(task):
    model = with_pruning(make_task_model(task), 3.0)
    pixel_values = make_inputs()["pixel_values"]
    output = model.vision_model(pixel_values)
    length = output.last_hidden_state.shape[1]
    counts = output.attention_mask.sum(dim=1)
    assert output.last_hidden_state.ndim == 3 and counts.max() == length < 37 and counts.min() < length
    assert output.attention_mask.equal(torch.arange(length) < counts[:, None])
    assert (output.last_hidden_state[~output.attention_mask] == 0).all()
    for index, count in enumerate(counts):
        alone = model.vision_model(pixel_values[index : index + 1])
        close(alone[0][0], output.last_hidden_state[index, :count], atol=1e-4)
    with model.pruning(None):
        assert model.vision_model(pixel_values)[0].shape[1] == 37


@torch.no_grad()
def test_a_tower_outlives_and_is_copied_with_its_model():
    model = with_pruning(make_task_model("vqa"), 3.0)
    pixel_values = make_inputs()["pixel_values"]
    expected = model.vision_model(pixel_values)[0]
    twin = copy.deepcopy(model)
    twin.set_pruning(None)
    assert model.vision_model(pixel_values)[0].equal(expected)
    assert twin.vision_model(pixel_values)[0].shape[1] == 37
    tower = model.vision_model
    del model
    gc.collect()
    assert tower(pixel_values)[0].equal(expected)


def test_a_tower_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="got inputs_embeds: expected only arguments"):
        make_task_model("vqa").vision_model(make_inputs()["pixel_values"], inputs_embeds=None)


@TEMPERATURE
@torch.no_grad()
def test_the_common_loop_with_the_towers(temperature):
    """Encode, then let the decoder generate from the states."""
    model = with_pruning(make_task_model("captioning"), temperature)
    pixel_values = make_inputs()["pixel_values"]
    images = model.vision_model(pixel_values)
    start = torch.full((3, 1), model.config.text_config.bos_token_id)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": model.config.text_config.sep_token_id}
    states = {"encoder_hidden_states": images[0], "encoder_attention_mask": images.attention_mask}
    captions = model.text_decoder.generate(input_ids=start, **states, **options)
    assert captions.equal(model.generate(pixel_values, max_new_tokens=6, do_sample=False))


@TEMPERATURE
@torch.no_grad()
def test_retrieval_features_are_model_outputs(temperature):
    model, inputs = with_pruning(make_task_model("retrieval"), temperature), TASKS["retrieval"].make_inputs()
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    calls = ((model.get_image_features, {"pixel_values": inputs["pixel_values"]}), (model.get_text_features, text))
    for encode, given in calls:
        output = encode(**given)
        assert output.pooler_output.shape == (3, model.config.image_text_hidden_size)
        close(output.pooler_output.norm(dim=1), torch.ones(3))
        assert output.last_hidden_state.ndim == 3
        assert (output.attention_mask is None) == (temperature == 0)
        in_a_tuple = encode(**given, return_dict=False)
        assert type(in_a_tuple) is tuple and in_a_tuple[1].equal(output.pooler_output)
        assert "return_dict" not in inspect.signature(encode).parameters  # transformers' decorator takes it


# Images that are encoded once


def asked(task):
    inputs = make_inputs()
    return {name: inputs[name] for name in ("input_ids", "attention_mask")} if task == "vqa" else {}


@GENERATING
@TEMPERATURE
@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_generate_takes_images_that_were_encoded_before(task, temperature, beams):
    model, pixel_values = with_pruning(make_task_model(task), temperature), make_inputs()["pixel_values"]
    options = {**asked(task), "max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    images = model.vision_model(pixel_values)
    encoded = {"image_embeds": images[0], "image_mask": images.attention_mask}
    assert model.generate(**encoded, **options).equal(model.generate(pixel_values=pixel_values, **options))


@torch.no_grad()
def test_one_encoded_image_and_several_questions():
    model, inputs = with_pruning(make_task_model("vqa"), 3.0), make_inputs()
    image = inputs["pixel_values"][:1]
    images = model.vision_model(image)
    answers = model.generate(**asked("vqa"), image_embeds=images[0], max_new_tokens=4)
    assert answers.equal(model.generate(**asked("vqa"), pixel_values=image.expand(3, -1, -1, -1), max_new_tokens=4))


@GENERATING
def test_encoded_images_of_another_shape_are_named(task):
    model, pixel_values = make_task_model(task), make_inputs()["pixel_values"]
    embeds = model.vision_model(pixel_values)[0]
    wrong = (
        ({}, "Neither of pixel_values and image_embeds: expected one of them"),
        ({"pixel_values": pixel_values, "image_embeds": embeds}, "Both of pixel_values and image_embeds"),
        ({"image_embeds": embeds[..., :5]}, r"image_embeds has shape \(3, 37, 5\): expected"),
        ({"image_embeds": embeds, "image_mask": torch.ones(3, 5)}, r"image_mask has shape \(3, 5\)"),
    )
    for given, message in wrong:
        with pytest.raises(ValueError, match=message):
            model.generate(**asked(task), **given)


def test_hidden_states_of_a_tower_learn():
    """A tower that is called alone can be trained, as a feature extractor."""
    model = with_pruning(make_task_model("vqa"), 3.0).train()
    output = model.vision_model(make_inputs()["pixel_values"])
    F.mse_loss(output.pooler_output, torch.zeros_like(output.pooler_output)).backward()
    assert model.vision_model.post_layernorm.weight.grad is not None
