"""What a user of any task's model relies on; what question answering has besides is in test_question_answering.py."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BlipForConditionalGeneration, BlipForQuestionAnswering

from madtp_hf import MadtpBlipForImagesAndTextClassification, MadtpBlipForImageTextRetrieval
from madtp_hf.modeling.madtp_blip_encoders import MERGE_FROM_LAYER
from madtp_hf.modeling.retrieval_loss import contrastive_loss, draw_hard_negatives

from .conftest import (
    TASKS,
    blip_config,
    make_caption_inputs,
    make_inputs,
    make_pair_inputs,
    make_retrieval_inputs,
    make_task_blip,
    make_task_model,
    one_sample,
)


TEMPERATURES = (0.3, 3.0, 30.0)
OTHER_TASKS = [task for task in TASKS if task != "vqa"]
LENGTHS = (9, 3, 7, 16, 5, 4, 12, 8)


def close(mine, theirs, atol=1e-5):
    torch.testing.assert_close(mine, theirs, atol=atol, rtol=0)


def padded_otherwise(inputs, task):
    """The same inputs with the padding in front of the texts, and with more of it behind; for captions, the latter alone."""
    names = TASKS[task].sequences
    lengths = inputs["attention_mask"].sum(1).tolist()
    left, longer = dict(inputs), dict(inputs)
    for name in names:
        left[name] = torch.stack([row.roll(len(row) - length) for row, length in zip(inputs[name], lengths)])
        value = {"input_ids": 17, "attention_mask": 0, "labels": -100}[name]
        longer[name] = F.pad(inputs[name], (0, 6), value=value)
    return [longer] if task == "captioning" else [left, longer]


# Pruning off


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

    for settings in ({}, {"num_beams": 3}, {"attention_mask": torch.ones(3, 4)} if prompt else {"num_beams": 2}):
        settings["max_new_tokens"] = 6
        expected = blip.generate(pixel_values, **prompts(), **settings)
        assert torch.equal(model.generate(pixel_values, **prompts(), **settings), expected)
        assert expected[:, : len(prompt or [2, 3]) - 1].tolist() == [[38, *(prompt or [2, 3])[1:-1]]] * 3
    settings = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True}
    scores = [m.generate(pixel_values, **prompts(), **settings).scores for m in (model, blip)]
    close(*scores)
    mine = prompts()
    model.generate(pixel_values, **mine, max_new_tokens=1)
    assert prompt is None or mine["input_ids"][0].tolist() == prompt


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
    close(model.get_image_features(inputs["pixel_values"]), F.normalize(blip.vision_proj(states), dim=-1))
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    states = blip.text_encoder(**text).last_hidden_state[:, 0]
    close(model.get_text_features(**text), F.normalize(blip.text_proj(states), dim=-1))
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
    """NLVR2's BLIP, from its description and the model's parameters alone: logits (B, 2) and the states of images and text."""
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


@pytest.mark.parametrize("task", OTHER_TASKS)
def test_a_tuple_on_request(task):
    model, inputs = make_task_model(task), TASKS[task].make_inputs()
    with torch.no_grad():
        output = model(**inputs)
        for mine, theirs in zip(model(**inputs, return_dict=False), output.to_tuple(), strict=True):
            assert mine is theirs or torch.equal(mine, theirs)


# Pruning on


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("task", OTHER_TASKS)
@torch.no_grad()
def test_an_output_does_not_depend_on_its_batch(task, temperature):
    model = make_task_model(task)
    model.set_pruning(temperature=temperature)
    inputs = TASKS[task].make_inputs(LENGTHS, seed=4)
    together = model(**inputs)
    for side in together.vision_tokens[-1].view(-1, 8):  # the samples do differ, and so do a pair's images
        assert len(set(side.tolist())) > 1
    if task == "nlvr2":
        assert (together.vision_tokens[-1, 0] != together.vision_tokens[-1, 1]).any()
    losses, weights = [], []
    for index in range(8):
        sample = one_sample(inputs, index, TASKS[task].sequences)
        alone = model(**sample)
        assert torch.equal(alone.vision_tokens[..., 0], together.vision_tokens[..., index])
        if task != "captioning":
            assert torch.equal(alone.text_tokens[:, 0], together.text_tokens[:, index])
        scores = alone[TASKS[task].scores][0]
        # Behind a shorter caption stands padding.
        close(scores, together[TASKS[task].scores][index][: len(scores)], atol=1e-4)
        if alone.loss is not None:
            losses.append([alone.task_loss, alone.alignment_loss])
            weights.append((sample["labels"][:, 1:] != -100).sum() if task == "captioning" else 1)
    if losses:
        weights = torch.tensor(weights, dtype=torch.float)
        close(
            weights @ torch.tensor(losses) / weights.sum(),
            torch.stack([together.task_loss, together.alignment_loss]),
            1e-4,
        )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("prompt", (None, [2, 11, 12, 3]))
def test_a_caption_does_not_depend_on_its_batch(prompt, temperature):
    model = make_task_model("captioning")
    model.set_pruning(temperature=temperature)
    pixel_values = make_caption_inputs(LENGTHS, seed=4)["pixel_values"]
    for settings in ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        settings["max_new_tokens"] = 6
        number = settings.get("num_return_sequences", 1)
        ids = None if prompt is None else torch.tensor([prompt] * 8)
        together = model.generate(pixel_values, ids, **settings)
        assert len(set(map(tuple, together.tolist()))) > 1
        for index in range(8):
            alone = model.generate(pixel_values[index : index + 1], None if ids is None else ids[:1], **settings)
            rows = together[index * number : (index + 1) * number]
            length = alone.shape[1]
            assert torch.equal(alone, rows[:, :length])
            # Behind a caption that has ended: padding; transformers' beam search repeats the end where padding is token 0.
            assert torch.isin(rows[:, length:], torch.tensor([0, 3])).all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@torch.no_grad()
def test_similarities_do_not_depend_on_the_batch(temperature):
    model = make_task_model("retrieval")
    model.set_pruning(temperature=temperature)
    inputs = make_retrieval_inputs(LENGTHS, seed=4)
    together = model(**inputs, use_itm_head=False)
    image_features = model.get_image_features(inputs["pixel_values"])
    text_features = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    close(together.image_feature, image_features)
    close(together.text_feature, text_features)
    close(together.itm_score, image_features @ text_features.T)
    alignment_losses = []
    for index in range(8):
        sample = one_sample(inputs, index)
        alone = model(**sample, use_itm_head=False)
        close(model.get_image_features(sample["pixel_values"])[0], image_features[index], atol=1e-4)
        close(model.get_text_features(sample["input_ids"])[0], text_features[index], atol=1e-4)
        close(alone.itm_score[0, 0], together.itm_score[index, index], atol=1e-4)
        assert torch.equal(alone.text_tokens[:, 0], together.text_tokens[:, index])
        alignment_losses.append(alone.alignment_loss)
    close(torch.stack(alignment_losses).mean(), together.alignment_loss, atol=1e-4)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("granularity", ["instance", "batch"])
@pytest.mark.parametrize("task", OTHER_TASKS)
@torch.no_grad()
def test_neither_side_nor_length_of_padding_matters(task, granularity, temperature):
    model = make_task_model(task)
    model.set_pruning(temperature=temperature)
    model.config.pruning_granularity = granularity
    inputs = TASKS[task].make_inputs()
    calls = [{}, {"use_itm_head": False}, {"return_loss": True}] if task == "retrieval" else [{}]
    for options in calls:
        torch.manual_seed(3)  # hard negatives are drawn
        expected = model(**inputs, **options)
        for variant in padded_otherwise(inputs, task):
            torch.manual_seed(3)
            output = model(**variant, **options)
            for name, value in expected.items():
                if not isinstance(value, torch.Tensor):
                    continue
                mine = output[name]
                if task == "captioning" and name == "logits":
                    real = inputs["attention_mask"] == 1
                    mine, value = mine[:, : real.shape[1]][real], value[real]
                close(mine, value)


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_token_counts_say_what_the_outputs_hold(task):
    model = make_task_model(task, vision_config={"num_hidden_layers": 5})
    model.set_pruning(temperature=3.0)
    inputs = TASKS[task].make_inputs((9, 5, 7, 12))
    output = model(**inputs, output_positions=True, output_hidden_states=True)
    vision = output.vision_tokens
    assert vision.dtype == torch.int64 and vision.shape == ((6, 2, 4) if task == "nlvr2" else (6, 4))
    assert (vision[0] == 37).all() and (vision.diff(dim=0) <= 0).all() and (vision[-1] < 37).all()
    left = vision[-1].movedim(-1, 0)  # (batch,) or (batch, side)
    lengths = torch.tensor(output.image_embeds.shape[-2]).expand(left.shape)
    if output.image_mask is not None:
        lengths = output.image_mask.sum(-1)
    assert torch.equal(lengths, left)
    # Pairs lie in turn in what is of single images.
    single = vision.transpose(1, 2).flatten(1) if task == "nlvr2" else vision
    for layer, (states, positions) in enumerate(zip(output.hidden_states, output.vision_positions, strict=True)):
        assert states.shape[:2] == positions.shape == (single.shape[1], single[layer].max())
        kept = (positions >= 0).sum(1)
        assert (kept <= single[layer]).all() and (positions[:, 0] == 0).all()
    if task == "captioning":
        assert output.text_tokens is None
        return
    assert output.text_tokens.dtype == torch.int64 and output.text_tokens.shape == (4, 4)
    assert output.text_tokens[0].tolist() == [9, 5, 7, 12] and (output.text_tokens.diff(dim=0) <= 0).all()
    assert (output.text_tokens[-1] < output.text_tokens[0]).any()


@torch.no_grad()
def test_the_left_image_counts_first():
    """Each side's counts are those of its image by itself."""
    model = make_task_model("nlvr2")
    images = make_task_model("retrieval")
    images.vision_model.load_state_dict(model.vision_model.state_dict())
    images.alignment.load_state_dict(model.alignment.state_dict())
    inputs = make_pair_inputs()
    for each in (model, images):
        each.set_pruning(temperature=3.0)
    counts = model(**inputs).vision_tokens
    for side in (0, 1):
        alone = images(**{**inputs, "labels": None, "pixel_values": inputs["pixel_values"][:, side]}).vision_tokens
        assert torch.equal(counts[:, side], alone)
    assert not torch.equal(counts[:, 0], counts[:, 1])


@pytest.mark.parametrize("temperature", (0.0, *TEMPERATURES))
@torch.no_grad()
def test_sides_are_a_matter_of_parameters(temperature):
    """With the parameters of the sides swapped, a pair reads as it did the other way round: each image has its own mask."""
    model = make_task_model("nlvr2", text_config={"num_hidden_layers": 8})
    model.set_pruning(temperature=temperature)
    inputs = make_pair_inputs()
    expected = model(**inputs)
    for layer in model.text_encoder.encoder.layer:
        attention = layer.crossattention
        attention.self0, attention.self1 = attention.self1, attention.self0
        attention.output.dense0, attention.output.dense1 = attention.output.dense1, attention.output.dense0
        if attention.output.merge_layer is not None:
            weight = attention.output.merge_layer.weight
            weight.copy_(weight.roll(32, dims=1))
    output = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(1)})
    close(output.logits, expected.logits, atol=1e-4)
    assert torch.equal(output.vision_tokens, expected.vision_tokens.flip(1))
    assert torch.equal(output.text_tokens, expected.text_tokens)
    close(output.loss, expected.loss, atol=1e-4)


@torch.no_grad()
def test_each_head_of_retrieval_counts_its_own_pass_over_the_text():
    model = make_task_model("retrieval")
    model.set_pruning(temperature=3.0)
    inputs = make_retrieval_inputs((16, 12, 14, 9))
    matching, apart = model(**inputs), model(**inputs, use_itm_head=False)
    assert torch.equal(matching.vision_tokens, apart.vision_tokens)
    assert torch.equal(
        matching.text_tokens[:2], apart.text_tokens[:2]
    )  # the first layer prunes before it sees the image
    assert not torch.equal(matching.text_tokens, apart.text_tokens)
    for output in (matching, apart):
        lengths = torch.tensor(output.question_embeds.shape[1]).expand(4)
        if output.text_mask is not None:
            lengths = output.text_mask.sum(1)
        assert torch.equal(lengths, output.text_tokens[-1])


@pytest.mark.parametrize("task", ("nlvr2", "retrieval"))
@torch.no_grad()
def test_the_encoder_token_stands_first_where_a_text_meets_an_image(task):
    model, inputs = make_task_model(task), TASKS[task].make_inputs()
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    replaced = {**inputs, "input_ids": inputs["input_ids"].clone()}
    replaced["input_ids"][:, 0] = 39
    expected = model(**replaced)[TASKS[task].scores]
    apart = model.get_text_features(**text) if task == "retrieval" else None
    model.config.encoder_token_id = 39
    close(model(**inputs)[TASKS[task].scores], expected)
    if task == "retrieval":  # and nowhere else
        close(model.get_text_features(**text), apart)


@torch.no_grad()
def test_images_encoded_before_match_as_they_do_with_their_pixels():
    model = make_task_model("retrieval")
    inputs = make_retrieval_inputs()
    for temperature in (0.0, 3.0):
        model.set_pruning(temperature=temperature)
        output = model(**inputs)
        again = model.match(inputs["input_ids"], inputs["attention_mask"], output.image_embeds, output.image_mask)
        close(again, output.itm_score)


# From BLIP


SOURCES = [(task, TASKS[task].blip_class) for task in OTHER_TASKS] + [("nlvr2", BlipForQuestionAnswering)]


@pytest.mark.parametrize("task, blip_class", SOURCES)
@torch.no_grad()
def test_from_blip_copies(task, blip_class, tmp_path):
    torch.manual_seed(1)
    blip = blip_class(blip_config(text_config={"num_hidden_layers": 8})).eval()
    blip.save_pretrained(tmp_path)
    model_class = TASKS[task].model_class
    for source in (blip, str(tmp_path)):
        model = model_class.from_blip(source, num_alignment_tokens=7, pruning_temperature=2.0)
        assert model.config.pruning_temperature == 2.0 and not model.training
        assert model.alignment.tokens.shape == (7, 32)
        theirs, copied = blip.state_dict(), set()
        for name, tensor in model.state_dict().items():
            if any(new in name for new in ("alignment.", "cls_head.", "merge_layer.")):
                continue
            # Of NLVR2's two cross-attentions, either is BLIP's one.
            for side in "01":
                name = name.replace(f".self{side}.", ".self.").replace(f".dense{side}.", ".dense.")
            assert torch.equal(tensor, theirs[name]), name
            copied.add(name)
        left_behind = set(theirs) - copied
        if task != "nlvr2":
            assert not left_behind
            continue
        assert not any(name.startswith(("vision_model.", "text_encoder.")) for name in left_behind)
        for layer in (6, 7):  # a merge layer begins as the mean of the two
            merge = model.text_encoder.encoder.layer[layer].crossattention.output.merge_layer
            left, right = torch.randn(2, 5, 32)
            close(merge(torch.cat([left, right], dim=1)), (left + right) / 2)
    before = blip.vision_model.post_layernorm.weight.clone()
    model.vision_model.post_layernorm.weight.zero_()
    assert torch.equal(blip.vision_model.post_layernorm.weight, before)


@pytest.mark.parametrize("temperature", (0.0, *TEMPERATURES))
@torch.no_grad()
def test_visual_reasoning_from_blip_reads_a_pair_of_twins_as_blip_reads_the_one(temperature):
    """Both cross-attentions are BLIP's, and the mean of the same is the same: in all layers, merging ones too."""
    blip = make_task_blip("retrieval", text_config={"num_hidden_layers": 8})
    alone = MadtpBlipForImageTextRetrieval.from_blip(blip, num_alignment_tokens=12)
    pair = MadtpBlipForImagesAndTextClassification.from_blip(blip, num_alignment_tokens=12)
    pair.alignment.load_state_dict(alone.alignment.state_dict())
    inputs = make_retrieval_inputs()
    expected = blip(**inputs).question_embeds
    for model in (alone, pair):
        model.set_pruning(temperature=temperature)
    one = alone(**inputs)
    two = pair(**{**inputs, "pixel_values": inputs["pixel_values"].unsqueeze(1).expand(-1, 2, -1, -1, -1)})
    assert torch.equal(two.text_tokens, one.text_tokens)
    for side in (0, 1):
        assert torch.equal(two.vision_tokens[:, side], one.vision_tokens)
        close(two.image_embeds[:, side], one.image_embeds)
    close(two.text_states, one.question_embeds, atol=1e-4)
    if temperature == 0:
        close(two.text_states, expected, atol=1e-4)


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_from_a_model_of_ours_all_but_the_alignment_is_copied(task, tmp_path):
    model, inputs = make_task_model(task, text_config={"num_hidden_layers": 7}), TASKS[task].make_inputs()
    model.set_pruning(temperature=3.0)
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        again = type(model).from_blip(source, num_alignment_tokens=5, pruning_temperature=0.0)
        assert again.alignment.tokens.shape == (5, 32) and again.config.num_alignment_tokens == 5
        model.set_pruning(None)
        close(again(**inputs)[TASKS[task].scores], model(**inputs)[TASKS[task].scores])
    same_size = type(model).from_blip(model)
    assert not torch.equal(same_size.alignment.tokens, model.alignment.tokens)


@pytest.mark.parametrize("task", OTHER_TASKS)
def test_from_blip_names_what_does_not_fit(task, model, tmp_path):
    model_class, expected = TASKS[task].model_class, TASKS[task].blip_class.__name__
    with pytest.raises(TypeError, match=f"got a MadtpBlipForQuestionAnswering: expected a {expected} or a "):
        model_class.from_blip(model)
    other = BlipForQuestionAnswering if task == "captioning" else BlipForConditionalGeneration
    other(blip_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"no checkpoint of a {expected}"):
        model_class.from_blip(tmp_path)
    with pytest.raises(TypeError, match="pruning_temprature"):
        model_class.from_blip(make_task_blip(task), pruning_temprature=1.0)


# Training


def missing_gradients(model):
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("temperature", (0.0, 1e-6, *TEMPERATURES))
@pytest.mark.parametrize("task", OTHER_TASKS)
def test_every_parameter_gets_a_gradient_in_every_step(task, temperature):
    """As distributed training needs them, which waits for each; also where pruning is on and finds nothing to prune."""
    small = (
        temperature == 1e-6
    )  # images of four patches, of which an alignment token likes each best; texts of two words
    # An alignment width of its own, for there to be maps to it; 7 layers, for one to merge.
    model = make_task_model(
        task,
        {"alignment_dim": 16, "num_alignment_tokens": 200},
        text_config={"num_hidden_layers": 7},
        vision_config={"image_size": 16 if small else 48},
    ).train()
    assert model.alignment.vision_projection is not None and model.alignment.text_projection is not None
    lengths, image_size = ((3, 3, 3), 16) if small else ((9, 5, 7), 48)
    inputs = {**TASKS[task].make_inputs(lengths, image_size=image_size), **TASKS[task].to_train}
    model.set_pruning(temperature=temperature)
    for modalities in (("vision", "text"), ("vision",), ("text",), ()):
        model.config.pruning_modalities = modalities
        model.zero_grad()
        output = model(**inputs)
        pruned = (output.vision_tokens[-1] < output.vision_tokens[0]).any()
        assert pruned == (temperature > 1e-6 and "vision" in modalities)
        output.loss.backward()
        assert not missing_gradients(model)
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        learns = model.alignment.tokens.grad.abs().max() > 0
        assert learns == (pruned if task == "captioning" else temperature > 0)
        close(output.loss, output.task_loss + 0.1 * output.alignment_loss)


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("task", OTHER_TASKS)
def test_gradient_checkpointing_changes_no_gradient(task, reentrant):
    model = make_task_model(task, text_config={"num_hidden_layers": 7}).train()
    model.set_pruning(temperature=3.0)
    inputs = {**TASKS[task].make_inputs(), **TASKS[task].to_train}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        model.zero_grad()
        torch.manual_seed(3)
        model(**inputs).loss.backward()
        assert not missing_gradients(model)
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("task", TASKS)
def test_autocast_trains_close_to_float32(task, checkpointing):
    model = make_task_model(task, text_config={"num_hidden_layers": 7}).train()
    model.set_pruning(temperature=3.0)
    inputs = {**TASKS[task].make_inputs(LENGTHS), **TASKS[task].to_train}
    if checkpointing:
        model.gradient_checkpointing_enable()
    torch.manual_seed(3)
    exact = model(**inputs).loss
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs)
    assert output[TASKS[task].scores].dtype == torch.bfloat16
    output.loss.backward()
    assert not missing_gradients(model)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert abs(output.loss - exact) < 0.1 * abs(exact)


@pytest.mark.parametrize("task", OTHER_TASKS)
@torch.no_grad()
def test_bfloat16_weights(task):
    model, inputs = make_task_model(task), {**TASKS[task].make_inputs(LENGTHS), **TASKS[task].to_train}
    model.set_pruning(temperature=3.0)
    torch.manual_seed(3)
    exact = model(**inputs).loss
    model = model.to(torch.bfloat16)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    torch.manual_seed(3)
    output = model(**inputs)
    assert output[TASKS[task].scores].dtype == torch.bfloat16 and abs(output.loss - exact) < 0.2 * abs(exact)
    if task == "captioning":
        assert len(model.generate(inputs["pixel_values"], max_new_tokens=3)) == 8


# Retrieval's losses


def test_the_contrastive_loss_by_hand():
    image, text = F.normalize(torch.randn(2, 5, 8), dim=-1)
    ids = torch.tensor([7, 4, 7, 2, 7])  # three texts are of one image
    loss = 0.0
    for query, keys in ((image, text), (text, image)):
        for row in range(5):
            log_likelihood = (query[row] @ keys.T / 0.07).log_softmax(0)
            own = [column for column in range(5) if ids[column] == ids[row]]
            loss -= sum(log_likelihood[column] for column in own) / len(own) / 5 / 2
    close(contrastive_loss(image, text, ids, None), loss)
    apart = contrastive_loss(image, text, torch.arange(5), None)
    labels = torch.arange(5)
    expected = F.cross_entropy(image @ text.T / 0.07, labels) + F.cross_entropy(text @ image.T / 0.07, labels)
    close(apart, expected / 2)
    assert abs(loss - apart) > 0.1


def test_a_hard_negative_is_never_of_the_same_image():
    ids = torch.tensor([7, 4, 7, 2, 7, 4])
    feature = F.normalize(torch.randn(6, 8), dim=-1)
    others = feature + 0.01 * torch.randn(6, 8)  # each one's likeliest is itself
    drawn = torch.zeros(6, 6)
    for _ in range(200):
        which, negatives = draw_hard_negatives(feature, others, ids, ids, 0.5)
        assert which.tolist() == list(range(6))
        drawn[which, negatives] += 1
    assert (drawn[ids[:, None] == ids] == 0).all()
    # The likelier, the more similar.
    likelihood = (feature @ others.T / 0.5).exp().masked_fill(ids[:, None] == ids, 0)
    close(drawn / 200, likelihood / likelihood.sum(1, keepdim=True), atol=0.15)


@pytest.mark.parametrize("temperature", (0.0, 3.0))
@torch.no_grad()
def test_the_training_loss_is_its_parts(temperature):
    """Of two pairs, each one's hard negative can only be the other."""
    model = make_task_model("retrieval")
    model.set_pruning(temperature=temperature)
    inputs = make_retrieval_inputs((9, 5))
    output = model(**inputs, return_loss=True)
    plain, apart = model(**inputs), model(**inputs, use_itm_head=False)
    close(output.itm_score, plain.itm_score)
    close(output.image_feature, apart.image_feature)
    close(output.text_feature, apart.text_feature)
    close(output.alignment_loss, apart.alignment_loss)
    close(output.contrastive_loss, contrastive_loss(apart.image_feature, apart.text_feature, torch.arange(2), None))
    crossed = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)}).itm_score
    scores = torch.cat([plain.itm_score, crossed, crossed])
    close(output.matching_loss, F.cross_entropy(scores, torch.tensor([1, 1, 0, 0, 0, 0])), atol=1e-4)
    close(output.task_loss, output.contrastive_loss + output.matching_loss)
    close(output.loss, output.task_loss + 0.1 * output.alignment_loss)


@torch.no_grad()
def test_texts_of_one_image_are_no_negatives_of_each_other(monkeypatch):
    model = make_task_model("retrieval")
    inputs = make_retrieval_inputs((9, 5, 7, 6))
    matched = []
    match = model.match
    monkeypatch.setattr(
        model, "match", lambda *texts_and_images: matched.append(texts_and_images) or match(*texts_and_images)
    )
    ids = torch.tensor([5, 5, 5, 1])
    images = model(**inputs).image_embeds
    for _ in range(10):
        assert model(**inputs, return_loss=True, image_ids=ids).loss.isfinite()
    for texts, _, states, _ in matched:
        assert len(texts) == 8
        for text, state in zip(texts, states):
            text_of = (inputs["input_ids"] == text).all(1).nonzero().item()
            image_of = (images - state).abs().sum((1, 2)).argmin()
            assert ids[text_of] != ids[image_of]


@pytest.mark.parametrize("temperature", (0.0, 3.0))
def test_retrieval_learns_a_small_batch(temperature):
    model = make_task_model("retrieval", image_text_hidden_size=32).train()
    model.set_pruning(temperature=temperature)
    inputs = make_retrieval_inputs((9, 5, 7, 6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        output = model(**inputs, return_loss=True)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append([output.contrastive_loss.item(), output.matching_loss.item()])
    losses = torch.tensor(losses)
    assert losses.isfinite().all()
    assert (losses[-5:].mean(0) < 0.5 * losses[:5].mean(0)).all(), losses
    # And what it learned is there without the loss.
    model.eval()
    with torch.no_grad():
        similarity = model(**inputs, use_itm_head=False).itm_score
        assert (similarity.argmax(1) == torch.arange(4)).all() and (similarity.argmax(0) == torch.arange(4)).all()


# Bad input


def change(**changes):
    """A function of the inputs: those with some of them changed, given as functions of what they were."""
    return lambda inputs: {**inputs, **{name: f(inputs.get(name)) for name, f in changes.items()}}


EVERYWHERE = [
    (change(pixel_values=lambda p: p[..., :1, :, :]), r"1, 48, 48\).*expected \(batch_size, 3"),
    (change(pixel_values=lambda p: p[..., :40, :]), "40 x 48 pixels.*takes 48 x 48"),
    (change(pixel_values=lambda p: p[:2]), "3 (questions|captions|sentences|texts) and pixel_values 2 images"),
    (change(attention_mask=lambda m: m[:, :4]), r"\(3, 4\) and input_ids \(3, 9\)"),
    (change(attention_mask=lambda m: m * torch.tensor([[1], [0], [1]])), r"0 everywhere in row \[1\]"),
    (change(output_attentions=lambda _: True), "keeps no attention maps"),
]
OWN = {
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
@pytest.mark.parametrize(
    "task, change, message", [(task, *case) for task in OTHER_TASKS for case in EVERYWHERE + OWN[task]]
)
def test_bad_input_is_named(task, change, message, temperature):
    model = make_task_model(task)
    model.set_pruning(temperature=temperature)
    with pytest.raises(ValueError, match=message):
        model(**change(TASKS[task].make_inputs()))


@pytest.mark.parametrize("task", OTHER_TASKS)
def test_texts_that_are_too_long_are_named(task):
    model = make_task_model(task)
    with pytest.raises(ValueError, match=r"25 tokens.*at most 24"):
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
