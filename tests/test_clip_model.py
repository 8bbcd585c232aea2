"""CLIP with pruning off is transformers'; with pruning on, a sample's result is its own."""

import copy

import pytest
import torch
from transformers import CLIPModel

from madtp_hf import MadtpClipConfig, MadtpClipModel
from madtp_hf.modeling.sequences import Sequences

from .conftest import close
from .helpers.clip import END, clip_config, make_clip, make_clip_inputs, make_clip_model, make_texts


LENGTHS = (9, 2, 7, 16, 5, 4, 12, 3)
TEMPERATURES = (0.3, 3.0, 30.0)


@pytest.fixture(params=("sdpa", "eager"))
def attention(request):
    return request.param


def pruned(temperature=3.0, **overrides):
    model = make_clip_model(**overrides)
    model.set_pruning(temperature=temperature)
    return model


# Pruning off


@pytest.mark.parametrize("masked", (True, False), ids=("mask", "no mask"))
@pytest.mark.parametrize("width, pad", ((None, 0), (24, END)), ids=("longest", "to the maximum"))
def test_with_pruning_off_it_is_transformers_clip(attention, width, pad, masked, path):
    clip, inputs = make_clip(), make_clip_inputs(width=width, pad=pad)
    model = MadtpClipModel.from_clip(clip, attn_implementation=attention)
    clip.set_attn_implementation(attention)
    if not masked:
        del inputs["attention_mask"]
    options = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    with torch.no_grad():
        mine = model(**inputs, return_loss=True, **options)
        theirs = clip(**inputs, return_loss=True, **options)
    for name in ("loss", "logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        close(mine[name], theirs[name])
    real = (
        make_clip_inputs(width=width)["attention_mask"].bool()
        if masked
        else torch.ones_like(inputs["input_ids"]).bool()
    )
    for name in ("text_model_output", "vision_model_output"):
        rows = real if name == "text_model_output" else slice(None)
        close(mine[name].pooler_output, theirs[name].pooler_output)
        close(mine[name].last_hidden_state[rows], theirs[name].last_hidden_state[rows])
        assert len(mine[name].hidden_states) == len(theirs[name].hidden_states)
        for one, other in zip(mine[name].hidden_states, theirs[name].hidden_states):
            close(one[rows], other[rows])
        if attention == "eager":
            for one, other in zip(mine[name].attentions, theirs[name].attentions, strict=True):
                close(one.transpose(1, 2)[rows], other.transpose(1, 2)[rows])
    assert mine.task_loss == mine.loss and mine.alignment_loss == 0
    assert mine.vision_tokens.tolist() == [[37] * 3] * 5 and mine.text_tokens.tolist() == [[9, 5, 7]] * 4


def test_features_are_those_of_transformers_clip():
    clip, inputs = make_clip(), make_clip_inputs()
    model, pixels = MadtpClipModel.from_clip(clip), inputs.pop("pixel_values")
    positions = torch.arange(3, 12)[None]
    for mine, theirs in (
        (model.get_image_features(pixels), clip.get_image_features(pixels)),
        (model.get_text_features(**inputs), clip.get_text_features(**inputs)),
        (
            model.get_text_features(**inputs, position_ids=positions),
            clip.get_text_features(**inputs, position_ids=positions),
        ),
    ):
        assert isinstance(mine, type(theirs)) and list(mine.keys()) == list(theirs.keys())
        close(mine.pooler_output, theirs.pooler_output)
    for one, other in zip(
        model.get_image_features(pixels, return_dict=False),
        clip.get_image_features(pixels, return_dict=False),
        strict=True,
    ):
        close(one, other)
    larger = torch.randn(2, 3, 64, 64)
    options = {"interpolate_pos_encoding": True}
    close(model.get_image_features(larger, **options)[1], clip.get_image_features(larger, **options)[1])


def test_texts_padded_in_front():
    clip, inputs = make_clip(), make_clip_inputs()
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.stack([row.roll(9 - n) for row, n in zip(inputs[name], (9, 5, 7))])
    model = MadtpClipModel.from_clip(clip)
    close(model(**inputs).text_embeds, clip(**inputs).text_embeds)
    assert model(**inputs).text_tokens[0].tolist() == [9, 5, 7]
    # Positions are transformers': of a text of too few words to prune, features are the same.
    model.set_pruning(temperature=1e-9)
    short = {**inputs, "input_ids": inputs["input_ids"][1:2], "attention_mask": inputs["attention_mask"][1:2]}
    close(model(**short).text_embeds, clip(**short).text_embeds)


@pytest.mark.parametrize("eos_token_id", (END, 2), ids=("by its id", "by the legacy rule"))
@pytest.mark.parametrize("temperature", (0.0, 3.0))
def test_the_end_of_text_is_found_as_transformers_does(eos_token_id, temperature):
    config = {"eos_token_id": eos_token_id}
    clip, inputs = make_clip(text_config=config), make_clip_inputs(width=20, pad=END)
    model = MadtpClipModel.from_clip(clip, num_alignment_tokens=12)
    model.set_pruning(temperature=temperature)
    if eos_token_id == END:  # where the vocabulary has grown since, the highest id is another word
        inputs["input_ids"][:, 1] = END - 2
        inputs["input_ids"][inputs["input_ids"] == END - 1] = 5
    output = model(**inputs)
    assert output.text_tokens[0].tolist() == [9, 5, 7]
    if not temperature:
        close(output.text_embeds, clip(**inputs).text_embeds)
    del inputs["attention_mask"]
    close(model(**inputs).text_embeds, output.text_embeds)


@pytest.mark.parametrize("activation", ("quick_gelu", "gelu", "relu"))
def test_activations(activation):
    clip = make_clip(text_config={"hidden_act": activation}, vision_config={"hidden_act": activation})
    model, inputs = MadtpClipModel.from_clip(clip).prepare_for_inference(), make_clip_inputs()
    with torch.no_grad():
        close(model(**inputs).logits_per_image, clip(**inputs).logits_per_image)


def test_from_clip_takes_a_folder_and_an_older_checkpoints_buffers(tmp_path):
    from safetensors.torch import load_file, save_file

    clip, inputs = make_clip(), make_clip_inputs()
    clip.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(24)[None]
    weights["vision_model.embeddings.position_ids"] = torch.arange(37)[None]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = MadtpClipModel.from_clip(str(tmp_path), alignment_dim=20)
    close(model(**inputs).logits_per_image, clip(**inputs).logits_per_image)
    assert model.alignment.tokens.shape == (100, 20) and {n for n, _ in clip.named_parameters()} == {
        n for n, _ in model.named_parameters() if not n.startswith("alignment.")
    }
    with pytest.raises(TypeError, match="from_clip got a CLIPTextModel: expected a CLIPModel or a MadtpClipModel"):
        MadtpClipModel.from_clip(clip.text_model)


def test_masked_padding_is_left_out_and_is_zero(path):
    """On the right and in front, the states of real tokens stay where they are."""
    clip, inputs = make_clip(), make_clip_inputs(width=20)
    for name in ("input_ids", "attention_mask"):
        inputs[name][1] = inputs[name][1].roll(15)
    model, entering = MadtpClipModel.from_clip(clip), []
    model.text_model.encoder.layers[0].mlp.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    with torch.no_grad():
        mine, theirs = (m.get_text_features(inputs["input_ids"], inputs["attention_mask"]) for m in (model, clip))
    assert entering[0].flatten(0, -2).shape[0] == 9 + 5 + 7
    close(mine.pooler_output, theirs.pooler_output)
    real = inputs["attention_mask"].bool()
    assert mine.last_hidden_state.shape == theirs.last_hidden_state.shape
    close(mine.last_hidden_state[real], theirs.last_hidden_state[real])
    assert not mine.last_hidden_state[~real].any()


@pytest.mark.parametrize("temperature", (0.0, 3.0))
def test_the_image_mask_is_there_whether_or_not_there_is_padding(temperature):
    model = pruned(temperature)
    for lengths in ((9,), (9, 5, 7)):
        output = model(**make_clip_inputs(lengths))
        assert output.image_mask.shape == output.vision_model_output.last_hidden_state.shape[:2]
        assert torch.equal(output.image_mask.sum(dim=1), output.vision_tokens[-1])


# Pruning on


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_sample_depends_neither_on_its_batch_nor_on_padding(temperature, path):
    model, inputs = pruned(temperature), make_clip_inputs(LENGTHS)
    without_mask = {name: value for name, value in inputs.items() if name != "attention_mask"}
    longer = {**without_mask, "input_ids": make_texts(LENGTHS, 24, pad=END)}
    with torch.no_grad():
        together = model(**inputs)
        for variant in (without_mask, longer):
            output = model(**variant)
            close(output.text_embeds, together.text_embeds)
            assert torch.equal(output.text_tokens, together.text_tokens)
        for index, length in enumerate(LENGTHS):
            alone = model(inputs["input_ids"][index : index + 1, :length], inputs["pixel_values"][index : index + 1])
            close(alone.text_embeds[0], together.text_embeds[index])
            close(alone.image_embeds[0], together.image_embeds[index])
            assert alone.text_tokens[:, 0].tolist() == together.text_tokens[:, index].tolist()
            assert alone.vision_tokens[:, 0].tolist() == together.vision_tokens[:, index].tolist()
    assert together.text_tokens[0].tolist() == list(LENGTHS)
    assert (together.vision_tokens[-1] < 37).any()


@pytest.mark.parametrize("temperature", (1e-6, 0.3, 3.0, 1e6))
def test_the_end_of_text_survives_at_any_temperature(temperature, path):
    """The last of a text's states is read, in a text's own place: where only two words are left, too."""
    model, ids = pruned(temperature), make_texts(LENGTHS)
    with torch.no_grad():
        texts = model._encode_text(ids, output_positions=True)
        feature = model.get_text_features(ids).pooler_output
    assert (texts.num_tokens[-1] >= torch.tensor(LENGTHS).clamp(max=5)).all()
    for row, length in enumerate(LENGTHS):
        for positions, count in zip(texts.positions, texts.num_tokens[:, row].tolist()):
            kept = positions[row, :count].tolist()
            assert kept[0] == 0 and kept[-1] == length - 1
            words = [position for position in kept if position >= 0]
            assert words == sorted(words)
            if -1 in kept:
                assert kept[-2] == -1
        if length < 5:  # fewer than three words
            assert set(texts.num_tokens[:, row].tolist()) == {length}
            dense = make_clip().get_text_features(ids[row : row + 1, :length]).pooler_output
            close(feature[row], dense[0])


def test_one_image_and_several_texts_and_the_other_way_round():
    model, inputs = pruned(), make_clip_inputs()
    with torch.no_grad():
        all_pairs = model(**inputs).logits_per_image
        one_image = model(**{**inputs, "pixel_values": inputs["pixel_values"][1:2]})
        one_text = model(inputs["input_ids"][2:3, :7], inputs["pixel_values"])
    close(one_image.logits_per_image, all_pairs[1:2], atol=1e-4)
    close(one_text.logits_per_text, all_pairs.T[2:3], atol=1e-4)


def test_prunes_what_it_is_told_to():
    inputs = make_clip_inputs((16, 12, 9))
    for modalities, vision, text in ((("vision",), True, False), (("text",), False, True), ((), False, False)):
        model = pruned(3.0, config_overrides={"pruning_modalities": modalities})
        output = model(**inputs)
        assert (output.vision_tokens[-1] < 37).all() == vision
        assert (output.text_tokens[-1] < output.text_tokens[0]).any() == text
    model = pruned(3.0, config_overrides={"pruning_granularity": "batch"})
    assert model(**inputs).vision_tokens[-1].unique().numel() == 1
    positions = pruned()(**inputs, output_positions=True).vision_positions
    assert len(positions) == 5 and positions[0].tolist() == [list(range(37))] * 3


def test_bad_input_is_named():
    model, inputs = make_clip_model(), make_clip_inputs()
    for change, error, message in (
        ({"pixel_values": inputs["pixel_values"][0]}, ValueError, r"expected \(batch_size, 3, height, width\)"),
        ({"pixel_values": torch.ones(1, 3, 40, 40)}, ValueError, "this model takes 48 x 48"),
        ({"input_ids": torch.ones(3, 30).long(), "attention_mask": None}, ValueError, "reads at most 24"),
        ({"attention_mask": torch.ones(3, 2)}, ValueError, "attention_mask has shape"),
        ({"pixel_values": inputs["pixel_values"][:2], "return_loss": True}, ValueError, "3 texts and pixel_values 2"),
        ({"inputs_embeds": inputs["input_ids"]}, TypeError, "got inputs_embeds"),
    ):
        with pytest.raises(error, match=message):
            model(**{**inputs, **change})


def test_the_last_row_of_each_sequence():
    states = torch.arange(12.0).view(6, 2)
    assert Sequences.varlen([1, 3, 2], "cpu").last(states)[:, 0].tolist() == [0, 6, 10]
    assert Sequences.padded(2, 3, "cpu").last(states)[:, 0].tolist() == [4, 10]
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert Sequences.padded(2, 3, "cpu", mask).last(states)[:, 0].tolist() == [2, 6]


def test_a_new_model_is_initialised_as_transformers_clip():
    fields = {name: value for name, value in clip_config().to_dict().items() if name != "model_type"}
    clip, model = CLIPModel(clip_config()), MadtpClipModel(MadtpClipConfig(**fields))
    mine = dict(model.named_parameters())
    for name, parameter in clip.named_parameters():
        if parameter.numel() > 200:
            assert mine[name].std().item() == pytest.approx(parameter.std().item(), rel=0.3), name
        elif parameter.ndim < 2 and "embedding" not in name:
            assert mine[name].equal(parameter), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_in_half_precision_eager_and_sdpa_are_as_close_as_in_transformers(dtype):
    inputs = make_clip_inputs((9, 5, 7, 9, 6, 8, 4))
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    apart = []
    for seed in range(4):
        torch.manual_seed(seed)
        clip, distances = CLIPModel(clip_config()).eval(), []
        for model in (clip, MadtpClipModel.from_clip(clip, num_alignment_tokens=12)):
            model, found = copy.deepcopy(model).to(dtype).eval(), []
            for attention in ("eager", "sdpa"):
                model.set_attn_implementation(attention)
                found.append(model(**inputs).logits_per_text.float())
            distances.append((found[0] - found[1]).abs().mean())
        apart.append(torch.stack(distances))
    theirs, mine = torch.stack(apart).mean(dim=0)
    assert mine < 1.5 * theirs
