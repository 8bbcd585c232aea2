import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from madtp_hf import MadtpBlipConfig, convert_original_checkpoint
from madtp_hf.tasks import TASKS as TASK_ENTRIES

from .conftest import blip_config, make_inputs


HEADS = MadtpBlipConfig(
    text_config={"num_attention_heads": 4, "bos_token_id": 38, "sep_token_id": 3},
    vision_config={"num_attention_heads": 4},
)
TASKS = pytest.mark.parametrize("task", [name for name, entry in TASK_ENTRIES.items() if entry.family.name == "BLIP"])


def to_original(model, alignment=True):
    """A model's weights under the original code's names, with the index buffers that it keeps."""
    state_dict = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("alignment.") and not alignment:
            continue
        name = name.replace("vision_model.embeddings.class_embedding", "visual_encoder.cls_token")
        name = name.replace("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed")
        name = name.replace("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj")
        name = name.replace("vision_model.post_layernorm", "visual_encoder.norm")
        name = name.replace("vision_model.encoder.layers", "visual_encoder.blocks")
        if name.startswith("visual_encoder"):
            name = name.replace("self_attn.qkv", "attn.qkv").replace("self_attn.projection", "attn.proj")
            name = name.replace("layer_norm", "norm")
        name = name.replace("alignment.tokens", "space_dict")
        name = name.replace("alignment.vision_projection", "visual_encoder.img_query_model.q_map.0")
        name = name.replace("alignment.text_projection", "text_encoder.encoder.txt_query_model.q_map.0")
        state_dict[name] = tensor.clone()
    for stack in ("text_encoder.embeddings", "text_decoder.bert.embeddings"):
        if f"{stack}.word_embeddings.weight" in state_dict:
            state_dict[f"{stack}.position_ids"] = torch.arange(24)[None]
    return state_dict


def with_training_state(state_dict):
    """What the original's training keeps in its checkpoints: momentum encoders, queues, temperatures, an
    optimizer, ..."""
    twins = {}
    for name, tensor in state_dict.items():
        for part in ("visual_encoder", "text_encoder", "text_decoder", "vision_proj", "text_proj"):
            if name.startswith(f"{part}."):
                twins[name.replace(part, f"{part}_m", 1)] = torch.full_like(tensor, 7)
    queues = {"image_queue": torch.ones(8, 5), "text_queue": torch.ones(8, 5), "idx_queue": torch.full((1, 5), -100)}
    pointers = {name: torch.zeros(1, dtype=torch.long) for name in ("queue_ptr", "ptr_queue")}
    unused = {"text_decoder.bert.encoder.txt_query_model.q_map.0.bias": torch.ones(3)}
    return {
        "model": {**twins, **state_dict, **queues, **pointers, **unused, "temp": torch.tensor(0.07)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-5}]},
        "config": {"vit": "base", "image_size": 48},
        "epoch": 3,
        "temperature": 7.5,
    }


def original_like(task="vqa", vision_width=32, **fields):
    """A small random model of the task, configured as the original is."""
    config = blip_config(
        text_config={"label_smoothing": 0.1, "num_hidden_layers": 8 if task == "nlvr2" else 2},
        vision_config={"hidden_size": vision_width, "num_hidden_layers": 3},
        image_text_hidden_size=24,
    ).to_dict()
    config.pop("model_type")
    torch.manual_seed(2)
    return (
        TASK_ENTRIES[task]
        .model_class(MadtpBlipConfig(**{"num_alignment_tokens": 12, "encoder_token_id": 39, **config, **fields}))
        .eval()
    )


def outputs(model, task, temperature=0.0, image_size=48):
    """All that a forward pass and, where there is one, `generate` return."""
    inputs = make_inputs(image_size=image_size)
    labels = inputs.pop("labels")
    more = {
        "vqa": {"labels": labels},
        "retrieval": {"use_itm_head": False},
        "nlvr2": {"labels": torch.tensor([0, 1, 1])},
    }
    if task == "captioning":
        inputs = {"pixel_values": inputs["pixel_values"], "labels": labels}
    if task == "nlvr2":
        inputs["pixel_values"] = torch.stack([inputs["pixel_values"], inputs["pixel_values"].flip(0)], dim=1)
    model.set_pruning(temperature=temperature)
    with torch.no_grad():
        result = [model(**inputs, **more.get(task, {}))]
        if task == "retrieval":
            result.append(model(**inputs))
        if model.can_generate():
            inputs.pop("labels", None)
            result.append({"generated": model.generate(**inputs, max_new_tokens=4)})
    return [{name: value for name, value in output.items() if isinstance(value, torch.Tensor)} for output in result]


def assert_same(mine, theirs):
    assert [list(output) for output in mine] == [list(output) for output in theirs]
    for one, other in zip(mine, theirs):
        for name in one:
            torch.testing.assert_close(one[name], other[name], msg=lambda message, name=name: f"{name}: {message}")


@TASKS
@pytest.mark.parametrize("layout", ("madtp", "blip"))
@pytest.mark.parametrize("vision_width", (32, 48))
def test_round_trip(task, layout, vision_width):
    original = original_like(task, vision_width)
    content = with_training_state(to_original(original, alignment=layout == "madtp"))
    if layout == "blip":
        del content["temperature"]
    names = set(content["model"])
    model = convert_original_checkpoint(content, task, config=HEADS)
    assert set(content["model"]) == names  # the caller's dictionary is left alone
    assert type(model) is TASK_ENTRIES[task].model_class and not model.training and not model.is_pruning
    assert model.config.encoder_token_id == 39 and model.config.vision_config.image_size == 48
    assert model.config.text_config.encoder_hidden_size == vision_width
    assert (model.alignment.vision_projection is None) == (vision_width == 32)
    assert hasattr(model.config, "original_temperature") == (layout == "madtp")
    for temperature in (0.0, 3.0) if layout == "madtp" else (0.0,):
        assert_same(outputs(model, task, temperature), outputs(original, task, temperature))
    # A BLIP checkpoint's new parameters are usable, as those of `from_blip`.
    assert all(output[name].isfinite().all() for output in outputs(model, task, 3.0) for name in output)


@pytest.mark.parametrize("form", ("dict", "pth", "pth under model", "safetensors", "half"))
def test_forms_of_a_checkpoint(form, tmp_path):
    original = original_like()
    state_dict = to_original(original)
    source = tmp_path / "model.pth"
    if form == "pth":
        torch.save({**state_dict, "epoch": 3}, source)
    elif form == "pth under model":
        torch.save(with_training_state(state_dict), source)
    elif form == "safetensors":
        source = str(tmp_path / "model.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, source)
    elif form == "half":
        original.half().float()
        source = {name: tensor.half() for name, tensor in state_dict.items()}
    else:
        source = state_dict
    model = convert_original_checkpoint(source, "vqa", config=HEADS)
    assert model.dtype == torch.float32
    assert getattr(model.config, "original_temperature", None) == (7.5 if form == "pth under model" else None)
    for temperature in (0.0, 3.0):
        assert_same(outputs(model, "vqa", temperature), outputs(original, "vqa", temperature))


@pytest.mark.parametrize("prefix", ("module.", "_orig_mod.", "module._orig_mod."))
def test_names_and_places_that_training_code_makes(prefix):
    original = original_like()
    content = with_training_state(to_original(original))
    named = {prefix + name: tensor for name, tensor in content["model"].items()}
    for source in ({**content, "model": named}, {"state_dict": named, "epoch": 3}, {"module": named}, named):
        model = convert_original_checkpoint(source, "vqa", config=HEADS)
        assert_same(outputs(model, "vqa", 3.0), outputs(original, "vqa", 3.0))


def test_heads_and_activation_are_asked_or_said():
    original = original_like(
        vision_config={**original_like().config.vision_config.to_dict(), "hidden_act": "quick_gelu"}
    )
    state_dict = to_original(original)
    with pytest.raises(ValueError, match=r"pass `heads`, or a config"):
        convert_original_checkpoint(state_dict, "vqa")
    with pytest.warns(UserWarning, match=r"Assumed, because weights don't tell: the activation gelu"):
        model = convert_original_checkpoint(state_dict, "vqa", heads=(4, 4))
    assert model.config.vision_config.num_attention_heads == model.config.text_config.num_attention_heads == 4
    model = convert_original_checkpoint(state_dict, "vqa", config=HEADS, activation="quick_gelu")
    assert model.config.vision_config.hidden_act == model.config.text_config.hidden_act == "quick_gelu"


@pytest.mark.parametrize("vision_width", (768, 1024))
def test_blip_sizes_need_no_configuration(vision_width):
    config = MadtpBlipConfig(
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": vision_width // 64,
            "image_size": 48,
            "layer_norm_eps": 1e-6,
            "initializer_range": 0.02,
        },
        text_config={
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 12,
            "vocab_size": 40,
            "bos_token_id": 38,
            "max_position_embeddings": 24,
            "label_smoothing": 0.1,
        },
        encoder_token_id=39,
    )
    original = TASK_ENTRIES["vqa"].model_class(config).eval()
    model = convert_original_checkpoint(to_original(original), "vqa")
    assert model.config.vision_config.num_attention_heads == vision_width // 64
    assert model.config.text_config.num_attention_heads == 12
    assert model.config.vision_config.layer_norm_eps == 1e-6 and model.config.text_config.layer_norm_eps == 1e-12
    assert model.config.num_alignment_tokens == 100 and model.config.alignment_dim == 768
    for temperature in (0.0, 3.0):
        assert_same(outputs(model, "vqa", temperature), outputs(original, "vqa", temperature))


def test_special_tokens_are_those_of_the_vocabulary():
    """bert-base-uncased with two more: [DEC] the last but one, [ENC] the last, [SEP] 102, [PAD] 0; a small one without
    102 will do."""
    for vocab_size in (30524, 40):
        config = MadtpBlipConfig(
            vision_config={
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
            },
            text_config={
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "vocab_size": vocab_size,
            },
        )
        model = convert_original_checkpoint(to_original(TASK_ENTRIES["captioning"].model_class(config)), "captioning")
        text_config = model.config.text_config
        assert (text_config.bos_token_id, model.config.encoder_token_id) == (vocab_size - 2, vocab_size - 1)
        assert text_config.sep_token_id == text_config.eos_token_id == 102 and text_config.pad_token_id == 0
        written = model.generate(torch.randn(1, 3, 384, 384), max_new_tokens=3)
        assert written[0, 0] == vocab_size - 2
    # A configuration that says nothing of the special tokens has bert-base-uncased's, which are not in a small
    # vocabulary.
    heads = MadtpBlipConfig(text_config={"num_attention_heads": 4}, vision_config={"num_attention_heads": 4})
    model = convert_original_checkpoint(to_original(original_like("captioning")), "captioning", config=heads)
    assert model.config.text_config.bos_token_id == 38


@TASKS
def test_images_of_another_size(task):
    original = original_like(task)
    state_dict = to_original(original)
    # A configuration's image size, 384 where it says nothing of it, is no wish for another one: the keyword is.
    assert HEADS.vision_config.image_size == 384
    model = convert_original_checkpoint(state_dict, task, config=HEADS, image_size=64)
    assert model.config.vision_config.image_size == 64
    mine, theirs = (m.vision_model.embeddings.position_embedding.data for m in (model, original))
    assert torch.equal(mine[:, :1], theirs[:, :1])  # the class token's
    grid = theirs[:, 1:].view(1, 6, 6, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(8, 8), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(mine[:, 1:], expected)
    large = make_inputs(image_size=64)["pixel_values"]
    with torch.no_grad():
        mine = model.vision_model(large).last_hidden_state
        # transformers' own, bicubic as well
        theirs = original.vision_model(large, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    outputs(model, task, 3.0, image_size=64)
    same = convert_original_checkpoint(state_dict, task, config=HEADS, image_size=48)
    assert_same(outputs(same, task), outputs(original, task))
    for wrong in (0, -48, 50, 48.0, "48"):
        with pytest.raises(
            ValueError,
            match=r"image_size=.*: expected a multiple of the checkpoint's patch size, 8, such as its own size, 48",
        ):
            convert_original_checkpoint(state_dict, task, config=HEADS, image_size=wrong)


def test_maps_to_the_alignment_tokens(caplog):
    """Named as in MADTP's code."""
    vision, text = "visual_encoder.img_query_model.q_map.0", "text_encoder.encoder.txt_query_model.q_map.0"
    # Alignment tokens of a third width: both branches are mapped.
    original = original_like("vqa", 48, alignment_dim=20)
    with torch.no_grad():
        original.alignment.vision_projection.bias.normal_()
    state_dict = to_original(original)
    assert state_dict[f"{vision}.weight"].shape == (20, 48) and state_dict[f"{text}.bias"].shape == (20,)
    model = convert_original_checkpoint(state_dict, "vqa", config=HEADS)
    assert_same(outputs(model, "vqa", 3.0), outputs(original, "vqa", 3.0))
    assert not caplog.records
    with pytest.raises(ValueError, match=r"1 with another shape .*q_map.0.weight .20, 9. instead of .20, 48."):
        convert_original_checkpoint({**state_dict, f"{vision}.weight": torch.ones(20, 9)}, "vqa", config=HEADS)
    # A map of a branch that has the width of the alignment tokens.
    state_dict = to_original(original_like("vqa"))
    with pytest.raises(ValueError, match=rf"{text}.weight can't be kept"):
        convert_original_checkpoint({**state_dict, f"{text}.weight": torch.eye(32)}, "vqa", config=HEADS)
    # Trained tokens and an untrained map do not go unmentioned.
    state_dict = to_original(original_like("vqa", 48))
    del state_dict[f"{vision}.weight"]
    convert_original_checkpoint(state_dict, "vqa", config=HEADS)
    assert "no alignment.vision_projection.weight: it is new" in caplog.text


@TASKS
def test_another_task_is_named(task):
    state_dict = to_original(original_like(task))
    for other in TASK_ENTRIES:
        if other != task:
            config = HEADS if TASK_ENTRIES[other].family.name == "BLIP" else None
            with pytest.raises(
                ValueError, match=f"not of task '{other}': .* looks like a checkpoint of task '{task}'."
            ):
                convert_original_checkpoint(state_dict, other, config=config)


@TASKS
def test_tensors_amiss_are_named(task):
    state_dict = to_original(original_like(task))
    without = {name: tensor for name, tensor in state_dict.items() if "fc2" not in name}
    head = {"vqa": "text_decoder", "captioning": "text_decoder", "nlvr2": "cls_head", "retrieval": "itm_head"}[task]
    beheaded = {name: tensor for name, tensor in state_dict.items() if not name.startswith(head)}
    words = next(name for name in state_dict if name.endswith("word_embeddings.weight"))
    norm = next(name for name in state_dict if name.endswith("LayerNorm.weight"))
    unpositioned = {name: tensor for name, tensor in state_dict.items() if name != "visual_encoder.pos_embed"}
    scalar = torch.tensor(1.0)
    for source, message in (
        (without, "not of task .*: 6 missing .vision_model.encoder.layers.0.mlp.fc2"),
        (beheaded, "not of task .*: (it has no tensor|.* missing)"),
        (unpositioned, "not of task .*: it has no tensor 'visual_encoder.pos_embed'"),
        ({**state_dict, "adapter.weight": scalar}, r"not of task .*: 1 unexpected .adapter.weight."),
        (
            {**state_dict, norm: torch.ones(31)},
            rf"not of task .*: 1 with another shape .{norm} .31,. instead of .32,.",
        ),
        ({**state_dict, words: scalar}, rf"{words} has shape \(\): expected \(words, width\)"),
        ({**state_dict, words: torch.ones(0, 32)}, rf"{words} has shape \(0, 32\): expected"),
        ({**state_dict, "visual_encoder.pos_embed": torch.ones(1, 40, 32)}, "pos_embed has 40 positions: expected"),
        ({**state_dict, "visual_encoder.pos_embed": torch.ones(1, 1, 32)}, "pos_embed has 1 positions: expected"),
        ({**state_dict, "visual_encoder.patch_embed.proj.weight": torch.ones(32)}, "expected .width, 3, patch size"),
        ({**state_dict, "space_dict": torch.ones(12)}, r"space_dict has shape \(12,\): expected \(tokens, width\)"),
        (dict.fromkeys(state_dict, 1.0), "The dictionary given contains no state dict"),
        ({"model": [state_dict]}, "The dictionary given contains no state dict"),
        ({}, "The dictionary given contains no state dict"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_original_checkpoint(source, task, config=HEADS)


def test_what_is_no_checkpoint_of_the_task_is_refused(blip, tmp_path):
    state_dict = to_original(original_like())
    whole = tmp_path / "model.pth"
    torch.save(state_dict, whole)
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(whole.read_bytes()[:5000])
    save_file(state_dict, tmp_path / "model.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    torch.save({"model": "nothing"}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "empty.pth").touch()
    pretrained = {**state_dict, "itm_head.weight": torch.zeros(2, 32)}
    untied = {**state_dict, "text_decoder.cls.predictions.decoder.weight": torch.zeros(40, 32)}
    for source, message in (
        (truncated, "truncated"),
        (cut, "truncated"),
        (tmp_path / "empty.pth", "truncated"),
        (tmp_path / "other.pth", "other.pth contains no state dict"),
        (tmp_path / "list.pth", "list.pth contains no state dict"),
        (
            pretrained,
            "not of task 'vqa': 1 unexpected .* looks like BLIP's pretrained checkpoint: expected one fine-tuned",
        ),
        (blip.state_dict(), "looks like a checkpoint of transformers' BLIP: .*from_blip"),
        (untied, "decoder.weight differs from its text_decoder.bert.embeddings.word_embeddings.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_original_checkpoint(source, "vqa", config=HEADS)
    with pytest.raises(ValueError, match="task='gqa': expected one of 'vqa', 'captioning', 'nlvr2', 'retrieval'"):
        convert_original_checkpoint(state_dict, "gqa")
    with pytest.raises(
        ValueError, match=r"vision tower is 32 wide, not a multiple of 64.* vision_config.num_attention_heads"
    ):
        convert_original_checkpoint(state_dict, "vqa")
    with pytest.raises(TypeError, match="config is a BlipConfig: expected a MadtpBlipConfig"):
        convert_original_checkpoint(state_dict, "vqa", config=blip.config)
    for nowhere in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="No checkpoint file"):
            convert_original_checkpoint(nowhere, "vqa")


def test_one_name_of_a_tied_pair_is_enough():
    original = original_like()
    state_dict = to_original(original)
    for name in ("decoder.weight", "decoder.bias"):
        del state_dict[f"text_decoder.cls.predictions.{name}"]
    model = convert_original_checkpoint(state_dict, "vqa", config=HEADS)
    assert_same(outputs(model, "vqa"), outputs(original, "vqa"))


class Hostile:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, capsys):
    with open(tmp_path / "hostile.pth", "wb") as file:
        pickle.dump({"model": Hostile()}, file)
    torch.save({"model": Hostile()}, tmp_path / "hostile_zip.pth")
    torch.save({"model": {"space_dict": torch.ones(1)}, "optimizer": Hostile()}, tmp_path / "hostile_beside.pth")
    for task in TASK_ENTRIES:
        for name in ("hostile.pth", "hostile_zip.pth", "hostile_beside.pth"):
            with pytest.raises(ValueError, match="refused"):
                convert_original_checkpoint(tmp_path / name, task)
    assert "code ran" not in capsys.readouterr().out
