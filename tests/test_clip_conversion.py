"""Checkpoints of OpenAI's CLIP and of MADTP's."""

import warnings

import pytest
import torch
from safetensors.torch import save_file

from madtp_hf import MadtpBlipConfig, MadtpClipConfig, MadtpClipModel, convert_original_checkpoint

from .helpers.clip import clip_config, make_clip, make_clip_inputs, make_clip_model


TOWERS = {"vision": "visual.transformer", "text": "transformer"}
HEADS = MadtpClipConfig(
    text_config={"num_attention_heads": 4, "hidden_size": 32}, vision_config={"num_attention_heads": 4}
)
NAMES = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "alignment.tokens": "space_dict",
    "logit_scale": "logit_scale",
}
IN_LAYERS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def to_original(model, alignment=True):
    """A model's weights under the original code's names."""
    weights = model.state_dict()
    original = {theirs: weights[ours].clone() for ours, theirs in NAMES.items() if ours in weights}
    original["visual.proj"] = weights["visual_projection.weight"].T.clone()
    original["text_projection"] = weights["text_projection.weight"].T.clone()
    for tower, layers in TOWERS.items():
        for index in range(getattr(model.config, f"{tower}_config").num_hidden_layers):
            ours, theirs = f"{tower}_model.encoder.layers.{index}", f"{layers}.resblocks.{index}"
            for kind in ("weight", "bias"):
                attention = [weights[f"{ours}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
                original[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(attention)
                for one, other in IN_LAYERS.items():
                    original[f"{theirs}.{other}.{kind}"] = weights[f"{ours}.{one}.{kind}"].clone()
                if alignment:
                    name = f"alignment.{tower}_projection.{index}.{kind}"
                    original[f"{theirs}.query_model.q_map.0.{kind}"] = weights[name].clone()
    if not alignment:
        original.pop("space_dict", None)
    return original


def with_training_state(original):
    twins = {}
    for name, tensor in original.items():
        first, dot, rest = name.partition(".")
        if first != "space_dict":
            twins[f"{first}_m{dot}{rest}"] = torch.full_like(tensor, 7)
    queues = {"image_queue": torch.ones(8, 5), "text_queue": torch.ones(8, 5), "idx_queue": torch.full((1, 5), -100)}
    pointers = {"ptr_queue": torch.zeros(1, dtype=torch.long)}
    return {"model": {**twins, **original, **queues, **pointers}, "epoch": 3, "temperature": 2.5}


def test_madtps_layout():
    model, inputs = make_clip_model(), make_clip_inputs()
    converted = convert_original_checkpoint(with_training_state(to_original(model)), "clip", config=HEADS)
    assert type(converted) is MadtpClipModel and not converted.training and not converted.is_pruning
    assert converted.config.original_temperature == 2.5
    for name, tensor in model.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor), name
    for temperature in (0.0, 3.0):
        outputs = []
        for each in (model, converted):
            each.set_pruning(temperature=temperature)
            outputs.append(each(**inputs))
        torch.testing.assert_close(outputs[1].logits_per_image, outputs[0].logits_per_image)
        assert torch.equal(outputs[1].vision_tokens, outputs[0].vision_tokens)


@pytest.mark.parametrize("form", ("dict", "pth", "safetensors", "half"))
def test_openais_layout(form, tmp_path):
    clip, inputs = make_clip(), make_clip_inputs()
    if form == "half":
        clip.half().float()
    original = to_original(clip, alignment=False)
    # What OpenAI's files have among the weights.
    original |= {
        "input_resolution": torch.tensor(48),
        "context_length": torch.tensor(24),
        "vocab_size": torch.tensor(98),
    }
    source = tmp_path / "clip.pth"
    if form == "pth":
        torch.save(original, source)
    elif form == "safetensors":
        source = tmp_path / "clip.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in original.items()}, source)
    else:
        source = {name: tensor.half() for name, tensor in original.items()} if form == "half" else original
    model = convert_original_checkpoint(source, "clip", config=HEADS)
    torch.testing.assert_close(model(**inputs).logits_per_text, clip(**inputs).logits_per_text, atol=1e-4, rtol=1e-4)
    model.set_pruning(temperature=3.0)  # what is new is of use
    assert model(**inputs).logits_per_text.isfinite().all()


def test_clips_sizes_need_no_configuration():
    clip = make_clip(
        text_config={"hidden_size": 64, "num_attention_heads": 1},
        vision_config={"hidden_size": 128, "num_attention_heads": 2},
    )
    model = convert_original_checkpoint(to_original(clip, alignment=False), "clip")
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.num_attention_heads, vision.num_attention_heads, vision.image_size) == (1, 2, 48)
    assert (text.eos_token_id, text.bos_token_id, text.hidden_act, vision.layer_norm_eps) == (
        97,
        96,
        "quick_gelu",
        1e-5,
    )
    inputs = make_clip_inputs()
    torch.testing.assert_close(model(**inputs).logits_per_text, clip(**inputs).logits_per_text, atol=1e-4, rtol=1e-4)


class Node(torch.nn.Module):
    def forward(self, x):
        return x


class Restored(torch.nn.Module):
    """A module that runs code of its own when its archive is loaded."""

    def __init__(self):
        super().__init__()
        self.weight = torch.ones(1)

    def forward(self, x):
        return x

    @torch.jit.export
    def __getstate__(self):
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        print("code ran")
        self.weight, self.training = state[0], state[1]


def save_as_torchscript(state_dict, path):
    """Save tensors as OpenAI does: as the parameters of a program's modules."""
    whole = Node()
    for name, tensor in state_dict.items():
        *parents, last = name.split(".")
        node = whole
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, Node())
            node = getattr(node, parent)
        node.register_buffer(last, tensor)
    torch.jit.script(whole).save(path)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_openais_torchscript_archive(tmp_path, capfd):
    clip, inputs = make_clip(), make_clip_inputs()
    clip.half().float()
    original = {name: tensor.half() for name, tensor in to_original(clip, alignment=False).items()}
    original |= {"input_resolution": torch.tensor(48), "context_length": torch.tensor(24)}
    save_as_torchscript(original, tmp_path / "ViT.pt")
    model = convert_original_checkpoint(tmp_path / "ViT.pt", "clip", config=HEADS)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model(**inputs).logits_per_text, clip(**inputs).logits_per_text, atol=1e-4, rtol=1e-4)

    torch.jit.script(Restored()).save(tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match=r"was refused: .*__setstate__.* could run code"):
        convert_original_checkpoint(tmp_path / "hostile.pt", "clip")
    assert "code ran" not in capfd.readouterr().out
    torch.jit.load(tmp_path / "hostile.pt")  # it would have
    assert "code ran" in capfd.readouterr().out
    (tmp_path / "cut.pt").write_bytes((tmp_path / "ViT.pt").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut.pt can't be read as a checkpoint, it may be truncated"):
        convert_original_checkpoint(tmp_path / "cut.pt", "clip")


@pytest.mark.parametrize("prefix", ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."))
def test_what_open_clip_and_wrappers_save(prefix, tmp_path):
    clip = make_clip()
    named = {prefix + name: tensor for name, tensor in to_original(clip, alignment=False).items()}
    mask = torch.full((24, 24), float("-inf")).triu(1)
    named |= {f"{prefix}attn_mask": mask, f"{prefix}transformer.attn_mask": mask}
    optimizer = {"state": {}, "param_groups": [{"lr": 5e-4}]}
    content = {"epoch": 7, "name": "2026-model_ViT-B-32", "state_dict": named, "optimizer": optimizer}
    torch.save(content, tmp_path / "epoch_7.pt")
    for source in (tmp_path / "epoch_7.pt", content, {"model": {"state_dict": named}}, {"module": named}, named):
        model = convert_original_checkpoint(source, "clip", config=HEADS)
        for name, tensor in clip.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name


def test_what_weights_do_not_tell_is_asked_or_said():
    """Two heads of 32 are not made one of 64, nor GELU the quick one, without a word."""
    clip = make_clip(
        text_config={"hidden_size": 64, "num_attention_heads": 2, "hidden_act": "gelu"},
        vision_config={"hidden_size": 64, "num_attention_heads": 4, "hidden_act": "gelu"},
    )
    original, inputs = to_original(clip, alignment=False), make_clip_inputs()
    with pytest.warns(UserWarning, match=r"Assumed.* 1 attention heads in the vision and 1 in the text .*quick_gelu"):
        convert_original_checkpoint(original, "clip")
    with pytest.warns(UserWarning, match=r"Assumed, because weights don't tell: the activation quick_gelu"):
        convert_original_checkpoint(original, "clip", heads=(4, 2))
    with pytest.warns(UserWarning, match=r"Assumed, because weights don't tell: the original's norms"):
        model = convert_original_checkpoint(original, "clip", heads=(4, 2), activation="gelu")
    torch.testing.assert_close(model(**inputs).logits_per_text, clip(**inputs).logits_per_text, atol=1e-4, rtol=1e-4)
    config = MadtpClipConfig(
        text_config={"hidden_size": 64, "num_attention_heads": 2, "hidden_act": "gelu"},
        vision_config={"num_attention_heads": 4, "hidden_act": "gelu"},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a configuration says it all
        model = convert_original_checkpoint(original, "clip", config=config)
    torch.testing.assert_close(model(**inputs).logits_per_text, clip(**inputs).logits_per_text, atol=1e-4, rtol=1e-4)
    for wrong in (4, (4,), (4, 0), "44", (4, 2.0)):
        with pytest.raises(ValueError, match=r"heads=.*: expected two numbers"):
            convert_original_checkpoint(original, "clip", heads=wrong)
    with pytest.raises(ValueError, match=r"heads=\(3, 2\).* 64 wide.* divides"):
        convert_original_checkpoint(original, "clip", heads=(3, 2))
    with pytest.raises(ValueError, match=r"activation='fast': expected .*gelu or quick_gelu"):
        convert_original_checkpoint(original, "clip", activation="fast")


def test_images_of_another_size():
    model = convert_original_checkpoint(to_original(make_clip_model()), "clip", config=HEADS, image_size=64)
    assert model.config.vision_config.image_size == 64
    assert model(**make_clip_inputs(image_size=64)).vision_tokens[0].tolist() == [65] * 3


def test_what_is_no_clip_is_named(tmp_path):
    original = to_original(make_clip_model())
    with pytest.raises(ValueError, match=r"not of task 'vqa': .* looks like a checkpoint of task 'clip'"):
        convert_original_checkpoint(original, "vqa")
    with pytest.raises(ValueError, match=r"1 missing .vision_model.pre_layrnorm.bias.; 1 unexpected .visual.extra."):
        amiss = {name: tensor for name, tensor in original.items() if name != "visual.ln_pre.bias"}
        convert_original_checkpoint({**amiss, "visual.extra": torch.ones(2)}, "clip", config=HEADS)
    with pytest.raises(TypeError, match="config is a MadtpBlipConfig: expected a MadtpClipConfig"):
        convert_original_checkpoint(original, "clip", config=MadtpBlipConfig())
    with pytest.raises(ValueError, match=r"transformers' CLIP: load it with .* `from_clip`"):
        convert_original_checkpoint(make_clip().state_dict(), "clip")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "ViT.pt")
    with pytest.raises(ValueError, match=r"not of task 'clip': it has no tensor 'visual.conv1.weight'"):
        convert_original_checkpoint(tmp_path / "ViT.pt", "clip")


def test_configuration_of_the_small_clip_is_what_its_weights_say():
    converted = convert_original_checkpoint(to_original(make_clip_model()), "clip", config=HEADS)
    for tower in ("text_config", "vision_config"):
        expected, got = getattr(clip_config(), tower), getattr(converted.config, tower)
        for field in ("hidden_size", "intermediate_size", "num_hidden_layers"):
            assert getattr(got, field) == getattr(expected, field)
