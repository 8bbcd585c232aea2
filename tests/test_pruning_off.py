"""With pruning off each model is transformers' BLIP, and NLVR2's its description."""

import pytest
import torch
import torch.nn.functional as F

from madtp_hf import MadtpBlipForQuestionAnswering
from madtp_hf.modeling.madtp_blip_encoders import MERGE_FROM_LAYER

from .conftest import (
    TASKS,
    close,
    make_blip,
    make_caption_inputs,
    make_inputs,
    make_pair_inputs,
    make_retrieval_inputs,
    make_task_blip,
    make_task_model,
    padded_otherwise,
)


pytestmark = pytest.mark.usefixtures("path")


@pytest.mark.parametrize("layers", [(4, 3), (2, 5)])
def test_question_answering_with_pruning_off_is_transformers_blip(layers):
    blip = make_blip(vision_config={"num_hidden_layers": layers[0]}, text_config={"num_hidden_layers": layers[1]})
    model = MadtpBlipForQuestionAnswering.from_blip(blip)
    inputs = make_inputs()
    with torch.no_grad():
        expected = blip(**inputs, output_hidden_states=True)
        decoder = blip.text_decoder(
            input_ids=inputs["labels"],
            encoder_hidden_states=blip.text_encoder(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                encoder_hidden_states=expected.image_embeds,
            ).last_hidden_state,
        )
        output = model(**inputs, output_hidden_states=True)
    for name in ("loss", "image_embeds", "last_hidden_state"):
        close(output[name], expected[name])
    close(output.logits, decoder.logits)
    for mine, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        close(mine, theirs)
    assert output.task_loss == output.loss and output.alignment_loss == 0
    assert (output.vision_tokens == 37).all() and output.vision_tokens.shape == (layers[0] + 1, 3)
    assert output.text_tokens.tolist() == [[9, 5, 7]] * (layers[1] + 1)


@pytest.mark.parametrize("lengths", [(7, 7, 7), (9, 3, 7)])
def test_question_answering_with_pruning_off_generates_what_transformers_blip_generates(blip, model, lengths):
    inputs = make_inputs(lengths)
    inputs.pop("labels")
    for settings in ({"max_new_tokens": 6}, {"max_new_tokens": 6, "num_beams": 3}):
        assert torch.equal(model.generate(**inputs, **settings), blip.generate(**inputs, **settings))
    scores = [
        m.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True, output_scores=True).scores
        for m in (model, blip)
    ]
    close(*scores)


@pytest.mark.parametrize("widths", [(32, 32), (48, 32)])
@torch.no_grad()
def test_captioning_with_pruning_off_is_transformers_blip(widths):
    sizes = {"vision_config": {"hidden_size": widths[0]}, "text_config": {"hidden_size": widths[1]}}
    blip, model = make_task_blip("captioning", **sizes), make_task_model("captioning", **sizes)
    inputs = make_caption_inputs()
    expected, output = blip(**inputs, output_hidden_states=True), model(**inputs, output_hidden_states=True)
    for name in ("loss", "logits", "image_embeds", "last_hidden_state"):
        close(output[name], expected[name])
    for mine, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        close(mine, theirs)
    assert output.task_loss == output.loss and output.alignment_loss == 0
    last = model(**{**inputs, "labels": None}, logits_to_keep=1)
    close(last.logits, expected.logits[:, -1:])
    assert last.loss is None and last.task_loss is None and last.alignment_loss is None
    # Labels by themselves are read as well, the start token first.
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    close(model(inputs["pixel_values"], labels=labels).loss, blip(**{**inputs, "labels": labels}).loss)


@pytest.mark.parametrize("prompt", (None, [2, 11, 12, 3]))
def test_captioning_with_pruning_off_generates_what_transformers_blip_generates(prompt):
    blip, model = make_task_blip("captioning"), make_task_model("captioning")
    pixel_values = make_caption_inputs()["pixel_values"]

    def prompts():  # transformers writes its start token into the tensor that it gets
        return {} if prompt is None else {"input_ids": torch.tensor([prompt] * 3)}

    start = [38, 11, 12] if prompt else [38]
    for settings in ({}, {"num_beams": 3}, {"attention_mask": torch.ones(3, 4)} if prompt else {"num_beams": 2}):
        settings["max_new_tokens"] = 6
        expected = blip.generate(pixel_values, **prompts(), **settings)
        assert torch.equal(model.generate(pixel_values, **prompts(), **settings), expected)
        assert expected[:, : len(start)].tolist() == [start] * 3
    settings = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True}
    scores = [m.generate(pixel_values, **prompts(), **settings).scores for m in (model, blip)]
    close(*scores)


def test_a_prompt_is_not_written_into():
    """transformers writes its start token there."""
    model, prompt = make_task_model("captioning"), torch.tensor([[2, 11, 12, 3]] * 3)
    model.generate(make_caption_inputs()["pixel_values"], prompt, max_new_tokens=1)
    assert prompt.tolist() == [[2, 11, 12, 3]] * 3


@pytest.mark.parametrize("widths", [(32, 32), (48, 32)])
@torch.no_grad()
def test_retrieval_with_pruning_off_is_transformers_blip(widths):
    sizes = {"vision_config": {"hidden_size": widths[0]}, "text_config": {"hidden_size": widths[1]}}
    blip, model = make_task_blip("retrieval", **sizes), make_task_model("retrieval", **sizes)
    inputs = make_retrieval_inputs()
    for head in (True, False):
        expected, output = (m(**inputs, use_itm_head=head, output_hidden_states=True) for m in (blip, model))
        for name in ("itm_score", "question_embeds", "last_hidden_state"):
            close(output[name], expected[name])
        for mine, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
            close(mine, theirs)
        assert output.itm_score.shape == ((3, 2) if head else (3, 3)) and output.loss is None
    # The features, from transformers' parts.
    states = blip.vision_model(inputs["pixel_values"]).last_hidden_state[:, 0]
    feature = model.get_image_features(inputs["pixel_values"]).pooler_output
    close(feature, F.normalize(blip.vision_proj(states), dim=-1))
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    states = blip.text_encoder(**text).last_hidden_state[:, 0]
    close(model.get_text_features(**text).pooler_output, F.normalize(blip.text_proj(states), dim=-1))
    # Similarities are of each image with each text, as many as there are.
    fewer = {**inputs, "pixel_values": inputs["pixel_values"][:2]}
    close(model(**fewer, use_itm_head=False).itm_score, blip(**fewer, use_itm_head=False).itm_score)


def attention_by_hand(query, key, value, heads, mask=None):
    """softmax(q k^T / sqrt(d)) v, a head at a time."""
    seen = []
    for q, k, v in zip(*(states.chunk(heads, dim=-1) for states in (query, key, value))):
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(mask[:, None] == 0, float("-inf"))
        seen.append(scores.softmax(dim=-1) @ v)
    return torch.cat(seen, dim=-1)


def visual_reasoning_by_hand(model, input_ids, pixel_values, attention_mask):
    """NLVR2's BLIP, from its description and the model's parameters alone: logits (B, 2) and the states of images and
    text.
    """
    parameters, config = model.state_dict(), model.config

    def linear(name, states):
        return states @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]

    def norm(name, states, eps):
        return F.layer_norm(states, states.shape[-1:], parameters[f"{name}.weight"], parameters[f"{name}.bias"], eps)

    images = []
    heads, eps = config.vision_config.num_attention_heads, config.vision_config.layer_norm_eps
    for side in (0, 1):
        embed, patch = "vision_model.embeddings", config.vision_config.patch_size
        kernel, bias = (parameters[f"{embed}.patch_embedding.{part}"] for part in ("weight", "bias"))
        patches = F.conv2d(pixel_values[:, side], kernel, bias, stride=patch).flatten(2).transpose(1, 2)
        class_token = parameters[f"{embed}.class_embedding"].expand(len(patches), 1, -1)
        states = torch.cat([class_token, patches], dim=1) + parameters[f"{embed}.position_embedding"]
        for layer in range(config.vision_config.num_hidden_layers):
            name = f"vision_model.encoder.layers.{layer}"
            qkv = linear(f"{name}.self_attn.qkv", norm(f"{name}.layer_norm1", states, eps)).chunk(3, dim=-1)
            states = states + linear(f"{name}.self_attn.projection", attention_by_hand(*qkv, heads))
            hidden = F.gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.layer_norm2", states, eps)))
            states = states + linear(f"{name}.mlp.fc2", hidden)
        images.append(norm("vision_model.post_layernorm", states, eps))

    heads, eps = config.text_config.num_attention_heads, config.text_config.layer_norm_eps
    embed = "text_encoder.embeddings"
    states = parameters[f"{embed}.word_embeddings.weight"][input_ids]
    states = states + parameters[f"{embed}.position_embeddings.weight"][: input_ids.shape[1]]
    states = norm(f"{embed}.LayerNorm", states, eps)
    for layer in range(config.text_config.num_hidden_layers):
        name = f"text_encoder.encoder.layer.{layer}"

        def attend(attention, states, context, mask=None, name=name):
            qkv = (
                linear(f"{name}.{attention}.{role}", source)
                for role, source in (("query", states), ("key", context), ("value", context))
            )
            return attention_by_hand(*qkv, heads, mask)

        seen = linear(f"{name}.attention.output.dense", attend("attention.self", states, states, attention_mask))
        states = norm(f"{name}.attention.output.LayerNorm", seen + states, eps)
        left, right = (
            linear(f"{name}.crossattention.output.dense{side}", attend(f"crossattention.self{side}", states, image))
            for side, image in enumerate(images)
        )
        if layer < 6:
            seen = (left + right) / 2
        else:
            seen = linear(f"{name}.crossattention.output.merge_layer", torch.cat([left, right], dim=-1))
        states = norm(f"{name}.crossattention.output.LayerNorm", seen + states, eps)
        hidden = F.gelu(linear(f"{name}.intermediate.dense", states))
        states = norm(f"{name}.output.LayerNorm", linear(f"{name}.output.dense", hidden) + states, eps)
    logits = linear("cls_head.2", linear("cls_head.0", states[:, 0]).relu())
    return logits, torch.stack(images, dim=1), states


@pytest.mark.parametrize("text_layers", (3, 8))
@torch.no_grad()
def test_visual_reasoning_with_pruning_off_is_its_description(text_layers):
    sizes = {"vision_config": {"hidden_size": 48}, "text_config": {"num_hidden_layers": text_layers}}
    model = make_task_model("nlvr2", **sizes)
    merging = {name.split(".")[3] for name in model.state_dict() if "merge_layer" in name}
    assert MERGE_FROM_LAYER == 6 and merging == ({"6", "7"} if text_layers == 8 else set())
    inputs = make_pair_inputs()
    output = model(**inputs)
    labels = inputs.pop("labels")
    logits, images, states = visual_reasoning_by_hand(model, **inputs)
    assert logits.abs().max() > 0.1  # there is something to compare
    close(output.logits, logits)
    close(output.image_embeds, images)
    close(output.text_states[inputs["attention_mask"] == 1], states[inputs["attention_mask"] == 1])
    close(output.task_loss, -logits.log_softmax(1)[torch.arange(3), labels].mean())
    assert output.loss == output.task_loss and output.alignment_loss == 0
    # The sides are not alike.
    swapped = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(1)})
    assert (swapped.logits - logits).abs().max() > 1e-3


@pytest.mark.parametrize("task", TASKS)
def test_a_tuple_on_request(task):
    model, inputs = make_task_model(task), TASKS[task].make_inputs()
    with torch.no_grad():
        output = model(**inputs)
        for mine, theirs in zip(model(**inputs, return_dict=False), output.to_tuple(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_neither_side_nor_length_of_padding_matters(task):
    model, inputs = make_task_model(task), TASKS[task].make_inputs()
    torch.manual_seed(0)  # hard negatives are drawn
    expected = model(**inputs, **TASKS[task].to_train)
    real = inputs["attention_mask"] == 1
    variants = padded_otherwise(inputs, task)
    if (
        task == "vqa"
    ):  # the decoder reads a question's padding as well, as transformers' does: only its side may change
        variants = variants[:1]
    for variant in variants:
        torch.manual_seed(0)
        output = model(**variant, **TASKS[task].to_train)
        mine, theirs = output[TASKS[task].scores], expected[TASKS[task].scores]
        if task == "captioning":  # whose scores are of every token
            mine, theirs = mine[:, : real.shape[1]][real], theirs[real]
        close(mine, theirs)
        close(output.loss, expected.loss)


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_larger_images_with_interpolated_positions(task):
    model, inputs = make_task_model(task), TASKS[task].make_inputs(image_size=64)
    vision_model = make_task_blip(task).vision_model
    embeds = model(**inputs, interpolate_pos_encoding=True).image_embeds
    pairs = [(embeds, inputs["pixel_values"])]
    if task == "nlvr2":
        pairs = [(embeds[:, side], inputs["pixel_values"][:, side]) for side in (0, 1)]
    for mine, pixel_values in pairs:
        assert mine.shape == (3, 65, 32)
        close(mine, vision_model(pixel_values, interpolate_pos_encoding=True).last_hidden_state)
