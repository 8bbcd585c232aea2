import pickle

import pytest
import torch
from safetensors.torch import save_file

from madtp_hf import MadtpBlipConfig, MadtpBlipForQuestionAnswering, convert_original_checkpoint

from .conftest import blip_config, make_inputs


HEADS = MadtpBlipConfig(
    text_config={"num_attention_heads": 4, "bos_token_id": 38, "sep_token_id": 3},
    vision_config={"num_attention_heads": 4},
)


def to_original(model, alignment=True):
    """A model's weights under the original code's names, with what its training keeps beside them."""
    state_dict = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("vision_model.embeddings.class_embedding", "visual_encoder.cls_token")
        name = name.replace("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed")
        name = name.replace("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj")
        name = name.replace("vision_model.post_layernorm", "visual_encoder.norm")
        name = name.replace("vision_model.encoder.layers", "visual_encoder.blocks")
        if name.startswith("visual_encoder"):
            name = name.replace("self_attn.qkv", "attn.qkv").replace("self_attn.projection", "attn.proj")
            name = name.replace("layer_norm", "norm")
        if name == "alignment.tokens":
            if not alignment:
                continue
            name = "space_dict"
        state_dict[name] = tensor.clone()
    for stack in ("text_encoder.embeddings", "text_decoder.bert.embeddings"):
        state_dict[f"{stack}.position_ids"] = torch.arange(24)[None]
    return state_dict


@pytest.fixture
def original_like(blip):
    config = MadtpBlipConfig(
        **{k: v for k, v in blip_config().to_dict().items() if k != "model_type"},
        num_alignment_tokens=12,
        encoder_token_id=39,
    )
    config.text_config.label_smoothing = 0.1
    torch.manual_seed(2)
    return MadtpBlipForQuestionAnswering(config).eval()


@pytest.mark.parametrize("layout", ("madtp", "blip"))
@pytest.mark.parametrize("form", ("dict", "pth", "pth under model", "safetensors"))
def test_round_trip(original_like, layout, form, tmp_path):
    state_dict = to_original(original_like, alignment=layout == "madtp")
    state_dict["visual_encoder_m.cls_token"] = torch.zeros(1)  # a momentum twin
    state_dict["image_queue"] = torch.zeros(3, 3)
    source = state_dict
    if form == "pth":
        source = tmp_path / "model.pth"
        torch.save(state_dict, source)
    elif form == "pth under model":
        source = tmp_path / "model.pth"
        torch.save({"model": state_dict, "temperature": 7.5, "epoch": 3}, source)
    elif form == "safetensors":
        source = tmp_path / "model.safetensors"
        save_file(state_dict, source)
    model = convert_original_checkpoint(source, "vqa", config=HEADS)
    assert model.config.encoder_token_id == 39 and not model.training
    assert model.config.vision_config.image_size == 48 and model.config.text_config.max_position_embeddings == 24
    temperatures = (0.0, 3.0) if layout == "madtp" else (0.0,)
    for temperature in temperatures:
        model.set_pruning(temperature=temperature)
        original_like.set_pruning(temperature=temperature)
        with torch.no_grad():
            torch.testing.assert_close(model(**make_inputs()).logits, original_like(**make_inputs()).logits)


def test_a_base_sized_checkpoint_needs_no_configuration():
    config = MadtpBlipConfig(
        vision_config={"num_hidden_layers": 1, "num_attention_heads": 12, "image_size": 32, "layer_norm_eps": 1e-6},
        text_config={
            "num_hidden_layers": 1,
            "num_attention_heads": 12,
            "vocab_size": 50,
            "max_position_embeddings": 16,
        },
    )
    model = convert_original_checkpoint(to_original(MadtpBlipForQuestionAnswering(config)), "vqa")
    assert model.config.vision_config.num_attention_heads == model.config.text_config.num_attention_heads == 12
    assert model.config.vision_config.layer_norm_eps == 1e-6 and model.config.text_config.layer_norm_eps == 1e-12


def test_what_is_no_checkpoint_of_the_task_is_refused(original_like, tmp_path):
    state_dict = to_original(original_like)
    whole = tmp_path / "model.pth"
    torch.save(state_dict, whole)
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(whole.read_bytes()[:5000])
    save_file(state_dict, tmp_path / "model.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    torch.save({"model": "nothing"}, tmp_path / "other.pth")
    other_task = {k: v for k, v in state_dict.items() if not k.startswith("text_encoder")}  # a captioner
    extra = {**state_dict, "itm_head.weight": torch.zeros(2, 32)}
    for source, message in (
        (truncated, "truncated"),
        (cut, "truncated"),
        (tmp_path / "other.pth", "holds no state dict"),
        (other_task, "not of task 'vqa': it has no tensor"),
        (extra, "not of task 'vqa': 1 unexpected"),
        ({k: v for k, v in state_dict.items() if "fc2" not in k}, "missing"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_original_checkpoint(source, "vqa", config=HEADS)
    with pytest.raises(ValueError, match="task='gqa': expected one of 'vqa'"):
        convert_original_checkpoint(state_dict, "gqa")
    with pytest.raises(FileNotFoundError, match="No checkpoint file"):
        convert_original_checkpoint(tmp_path / "nowhere.pth", "vqa")


class Hostile:
    def __reduce__(self):
        return print, ("code ran",)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, capsys):
    with open(tmp_path / "hostile.pth", "wb") as file:
        pickle.dump({"model": Hostile()}, file)
    torch.save({"model": Hostile()}, tmp_path / "hostile_zip.pth")
    for name in ("hostile.pth", "hostile_zip.pth"):
        with pytest.raises(ValueError, match="refused"):
            convert_original_checkpoint(tmp_path / name, "vqa")
    assert "code ran" not in capsys.readouterr().out
