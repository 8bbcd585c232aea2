"""With pruning on: an output is its sample's alone, token counts say what there is, settings do what they say."""

import pytest
import torch
import torch.nn.functional as F

from madtp_hf import MadtpBlipConfig

from .conftest import (
    LENGTHS,
    TASKS,
    TEMPERATURES,
    blip_config,
    close,
    make_caption_inputs,
    make_inputs,
    make_pair_inputs,
    make_retrieval_inputs,
    make_task_model,
    one_sample,
    padded_otherwise,
)


pytestmark = pytest.mark.usefixtures("path")


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("task", TASKS)
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
@torch.no_grad()
def test_an_answer_does_not_depend_on_its_batch(model, temperature):
    """Also of a question of two tokens."""
    inputs = make_inputs(lengths=(9, 3, 7, 16, 5, 2, 12, 8), seed=4)
    inputs.pop("labels")
    model.set_pruning(temperature=temperature)
    together = model.generate(**inputs, max_new_tokens=5)
    for index in range(8):
        alone = model.generate(**one_sample(inputs, index), max_new_tokens=5)
        length = alone.shape[1]
        assert torch.equal(alone[0], together[index, :length])
        assert (together[index, length:] == 0).all()


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
            # Behind a caption that has ended: padding; transformers' beam search repeats the end where padding is
            # token 0.
            assert torch.isin(rows[:, length:], torch.tensor([0, 3])).all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@torch.no_grad()
def test_similarities_do_not_depend_on_the_batch(temperature):
    model = make_task_model("retrieval")
    model.set_pruning(temperature=temperature)
    inputs = make_retrieval_inputs(LENGTHS, seed=4)
    together = model(**inputs, use_itm_head=False)
    image_features = model.get_image_features(inputs["pixel_values"]).pooler_output
    text_features = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    close(together.image_feature, image_features)
    close(together.text_feature, text_features)
    close(together.itm_score, image_features @ text_features.T)
    alignment_losses = []
    for index in range(8):
        sample = one_sample(inputs, index)
        alone = model(**sample, use_itm_head=False)
        close(model.get_image_features(sample["pixel_values"]).pooler_output[0], image_features[index], atol=1e-4)
        close(model.get_text_features(sample["input_ids"]).pooler_output[0], text_features[index], atol=1e-4)
        close(alone.itm_score[0, 0], together.itm_score[index, index], atol=1e-4)
        assert torch.equal(alone.text_tokens[:, 0], together.text_tokens[:, index])
        alignment_losses.append(alone.alignment_loss)
    close(torch.stack(alignment_losses).mean(), together.alignment_loss, atol=1e-4)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("granularity", ["instance", "batch"])
@pytest.mark.parametrize("task", TASKS)
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
    assert output.image_mask.dtype == torch.bool and output.image_mask.shape == output.image_embeds.shape[:-1]
    assert torch.equal(output.image_mask.sum(-1), left)
    # Pairs lie in turn in what is of single images.
    single = vision.transpose(1, 2).flatten(1) if task == "nlvr2" else vision
    for layer, (states, positions) in enumerate(zip(output.hidden_states, output.vision_positions, strict=True)):
        assert states.shape[:2] == positions.shape == (single.shape[1], single[layer].max())
        kept = (positions >= 0).sum(1)
        assert (kept <= single[layer]).all() and (positions[:, 0] == 0).all()
        # Patches in order, each at most once.
        for row in positions:
            assert (row[row >= 0].diff() > 0).all()
    if task == "captioning":
        assert output.text_tokens is None
        return
    assert output.text_tokens.dtype == torch.int64 and output.text_tokens.shape == (4, 4)
    assert output.text_tokens[0].tolist() == [9, 5, 7, 12] and (output.text_tokens.diff(dim=0) <= 0).all()
    assert (output.text_tokens[-1] < output.text_tokens[0]).any()
    if task == "nlvr2":  # which gives no mask of its text
        assert output.text_states.shape[1] == output.text_tokens[-1].max()
        return
    states, mask = {
        "vqa": (output.get("question_states"), output.get("question_mask")),
        "retrieval": (output.get("question_embeds"), output.get("text_mask")),
    }[task]
    assert mask.dtype == torch.bool and mask.shape == states.shape[:-1]
    assert torch.equal(mask.sum(1), output.text_tokens[-1])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("modalities", [("vision",), ("text",)])
@torch.no_grad()
def test_only_the_modalities_that_are_asked_for_prune(task, modalities):
    model = make_task_model(task, {"pruning_modalities": modalities, "pruning_temperature": 30.0})
    output = model(**TASKS[task].make_inputs((12, 12)), **TASKS[task].to_train)
    assert (output.vision_tokens[-1] < output.vision_tokens[0]).all() == ("vision" in modalities)
    if task == "captioning":  # which has no text to prune
        assert output.text_tokens is None
    else:
        assert (output.text_tokens[-1] < output.text_tokens[0]).all() == ("text" in modalities)
        assert output.alignment_loss > 0


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_batch_granularity_keeps_as_many_in_every_sample(task):
    model = make_task_model(task, {"pruning_granularity": "batch"})
    model.set_pruning(temperature=3.0)
    output = model(**TASKS[task].make_inputs((7, 7, 7)))
    counts = output.vision_tokens.flatten(1)
    assert (counts == counts[:, :1]).all() and counts[-1, 0] < 37 and output.image_mask.all()


@pytest.mark.parametrize("task", TASKS)
def test_branches_of_different_widths_are_mapped_to_the_alignment_width(task):
    fields = blip_config(vision_config={"hidden_size": 48, "num_attention_heads": 6}).to_dict()
    fields.pop("model_type")
    wide = TASKS[task].model_class(MadtpBlipConfig(**fields, num_alignment_tokens=12))
    assert wide.alignment.vision_projection.weight.shape == (32, 48) and wide.alignment.text_projection is None
    wide.set_pruning(temperature=3.0)
    output = wide(**TASKS[task].make_inputs(), **TASKS[task].to_train)
    output.loss.backward()
    assert (output.vision_tokens[-1] < 37).any()
    assert wide.alignment.vision_projection.weight.grad.abs().max() > 0


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
    """With the parameters of the sides swapped, a pair reads as it did the other way round: each image has its own
    mask.
    """
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
        assert torch.equal(output.text_mask.sum(1), output.text_tokens[-1])


@pytest.mark.parametrize("task", ("vqa", "nlvr2", "retrieval"))
@torch.no_grad()
def test_the_encoder_token_stands_first_where_a_text_meets_an_image(task):
    model, inputs = make_task_model(task), TASKS[task].make_inputs()
    with_token = make_task_model(task, {"encoder_token_id": 39})
    replaced = {**inputs, "input_ids": inputs["input_ids"].clone()}
    replaced["input_ids"][:, 0] = 39
    scores = TASKS[task].scores
    close(with_token(**inputs)[scores], model(**replaced)[scores])
    assert (inputs["input_ids"][:, 0] != 39).all()  # the caller's tensor is its own


@torch.no_grad()
def test_the_encoder_token_stands_nowhere_in_a_text_by_itself():
    model, inputs = make_task_model("retrieval"), make_retrieval_inputs()
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with_token = make_task_model("retrieval", {"encoder_token_id": 39})
    close(with_token.get_text_features(**text).pooler_output, model.get_text_features(**text).pooler_output)


@torch.no_grad()
def test_images_encoded_before_match_as_they_do_with_their_pixels():
    model = make_task_model("retrieval")
    inputs = make_retrieval_inputs()
    for temperature in (0.0, 3.0):
        model.set_pruning(temperature=temperature)
        output = model(**inputs)
        again = model.match(inputs["input_ids"], inputs["attention_mask"], output.image_embeds, output.image_mask)
        close(again, output.itm_score)


@pytest.mark.parametrize("task", ("vqa", "nlvr2", "retrieval"))
@torch.no_grad()
def test_only_the_real_tokens_of_a_text_need_to_fit(task):
    model, inputs = make_task_model(task), TASKS[task].make_inputs()
    model.set_pruning(temperature=3.0)
    expected = model(**inputs)[TASKS[task].scores]
    for name in ("input_ids", "attention_mask"):
        inputs[name] = F.pad(inputs[name], (0, 40))
    close(model(**inputs)[TASKS[task].scores], expected)


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_small_temperatures_prune_in_float16_as_in_float32(task):
    model = make_task_model(task)
    model.set_pruning(temperature=1e-5)
    gone = []
    for seed in range(4):
        inputs = TASKS[task].make_inputs(LENGTHS, seed=seed)
        exact = model(**inputs).vision_tokens
        with torch.autocast("cpu", dtype=torch.float16):
            rounded = model(**inputs).vision_tokens
        gone.append(torch.stack([37 - counts[-1].flatten() for counts in (exact, rounded)]))
    exact, rounded = torch.cat(gone, dim=1).float()
    # Rounding decides for a token here and there; in float16 nothing would be pruned if the gate overflowed.
    assert (exact > 0).float().mean() > 0.75 and (rounded > 0).float().mean() > 0.75
    assert rounded.mean().item() == pytest.approx(exact.mean().item(), rel=0.1)


@pytest.mark.parametrize("temperature", (-1.0, float("nan"), float("inf"), "high", True))
def test_a_bad_temperature_leaves_the_model_as_it_was(model, temperature):
    model.set_pruning(temperature=2.0)
    with pytest.raises(ValueError, match="temperature="):
        model.set_pruning(temperature=temperature)
    assert model.config.pruning_temperature == 2.0


def test_set_pruning(model):
    model.set_pruning(temperature=2.0)
    for reduction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"expected a number in \[0, 1\)"):
            model.set_pruning(reduction=reduction)
    with pytest.raises(ValueError, match="calibrate"):
        model.set_pruning(reduction=0.5)
    with pytest.raises(ValueError, match="one of them"):
        model.set_pruning(temperature=1.0, reduction=0.5)
    model.config.pruning_schedule = [[0.4, 1.0], [0.6, 4.0]]
    with pytest.raises(ValueError, match=r"0\.4 to 0\.6"):
        model.set_pruning(reduction=0.7)
    assert model.config.pruning_temperature == 2.0
    for reduction, temperature in ((0.4, 1.0), (0.5, 2.0), (0.6, 4.0), (0, 0.0)):
        model.set_pruning(reduction=reduction)
        assert model.config.pruning_temperature == pytest.approx(temperature)
    model.config.pruning_schedule = [[0.4, 1.0]]
    model.set_pruning(reduction=0.4)
    assert model.config.pruning_temperature == 1.0
    with pytest.raises(
        TypeError, match=r"0\.5 without a name.*set_pruning\(reduction=0\.5\).*set_pruning\(temperature=0\.5\)"
    ):
        model.set_pruning(0.5)
    assert model.config.pruning_temperature == 1.0
    model.set_pruning(None)
    assert model.config.pruning_temperature == 0.0 and not model.is_pruning


def test_set_pruning_with_a_factor_on_the_threshold(model):
    config = model.config
    model.set_pruning(temperature=2.0, factor=0.5)
    for bad in ({"temperature": 3.0, "factor": 0.0}, {"temperature": 3.0, "factor": 1.3}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match="expected"):
            model.set_pruning(**bad)
        assert config.pruning_setting == {"temperature": 2.0, "factor": 0.5}
    with pytest.raises(ValueError, match="expected one of them"):
        model.set_pruning(reduction=0.4, factor=0.5)
    with pytest.raises(ValueError, match="without temperature"):
        model.set_pruning(factor=0.5)
    model.set_pruning(temperature=2.0)
    assert config.pruning_setting == {"temperature": 2.0, "factor": 1.0}
    config.pruning_schedule = [[0.2, 1.0, 0.25], [0.4, 1.0], [0.6, 4.0]]
    for reduction, temperature, factor in ((0.2, 1.0, 0.25), (0.3, 1.0, 0.5), (0.4, 1.0, 1.0), (0.5, 2.0, 1.0)):
        model.set_pruning(reduction=reduction)
        assert config.pruning_setting == pytest.approx({"temperature": temperature, "factor": factor})
    model.set_pruning(reduction=0)
    assert config.pruning_setting is None


@pytest.mark.parametrize("task", TASKS)
def test_a_smaller_factor_keeps_more_tokens(task, path):
    model, inputs = make_task_model(task), TASKS[task].make_inputs()
    kept = []
    for factor in (1e-6, 0.6, 0.9, 1.0, None):
        model.set_pruning(temperature=1.0, factor=factor)
        with torch.no_grad():
            kept.append(model(**inputs).vision_tokens.sum().item())
    model.set_pruning(None)
    with torch.no_grad():
        assert kept[0] == model(**inputs).vision_tokens.sum().item()
    assert kept[0] > kept[1] > kept[2] > kept[3] == kept[4]


@pytest.mark.parametrize("task", TASKS)
def test_settings_changed_by_hand_are_checked(task):
    model = make_task_model(task)
    for field, value in (
        ("pruning_granularity", "sample"),
        ("pruning_modalities", ("audio",)),
        ("pruning_temperature", -1.0),
        ("pruning_schedule", [[0.5]]),
        ("pruning_token_counts", [[1.0, [5], [5]]]),
        ("alignment_loss_weight", float("nan")),
        ("encoder_token_id", 40),
    ):
        before = getattr(model.config, field)
        with pytest.raises(ValueError, match=rf"{field}=.*: expected"):
            setattr(model.config, field, value)
        assert getattr(model.config, field) == before
