"""What transformers' models take, our models take, and give what transformers' give; what can't be is said in one
sentence."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, BlipProcessor, GenerationConfig
from transformers.utils.logging import warning_once

from madtp_hf import MadtpBlipForQuestionAnswering

from .conftest import TASKS, make_inputs, make_processor, make_task_blip, make_task_model
from .test_static_shapes import frozen, question, scores, without_labels


TASK = pytest.mark.parametrize("task", TASKS)
TEMPERATURE = pytest.mark.parametrize("temperature", [0.0, 3.0])
GENERATING = pytest.mark.parametrize("task", ["vqa", "captioning"])


def model_and_inputs(task, temperature=0.0, overrides=None):
    model = make_task_model(task, overrides)
    model.set_pruning(temperature=temperature)
    return model, {**TASKS[task].make_inputs(), **TASKS[task].to_train}


# Offloaded weights


@TASK
@TEMPERATURE
@pytest.mark.parametrize("alignment_dim", [None, 20])
def test_offloaded_weights_compute_the_same(task, temperature, alignment_dim):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, inputs = model_and_inputs(task, temperature, {"alignment_dim": alignment_dim})
    with torch.no_grad():
        torch.manual_seed(5)
        expected = model(**inputs)
        accelerate.cpu_offload(model, execution_device="cpu")
        for _ in range(2):
            torch.manual_seed(5)
            output = model(**inputs)
            assert torch.equal(output.vision_tokens, expected.vision_tokens)
            torch.testing.assert_close(output.loss, expected.loss)


@torch.no_grad()
def test_a_device_map_with_the_alignment_tokens_on_disk(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, inputs = model_and_inputs("vqa", 3.0)
    expected = model(**inputs)
    model.save_pretrained(tmp_path / "model")
    places = {name: "cpu" for name, _ in model.named_children()}
    loaded = type(model).from_pretrained(
        tmp_path / "model", device_map={**places, "alignment": "disk"}, offload_folder=tmp_path / "disk"
    )
    output = loaded(**inputs)
    assert torch.equal(output.vision_tokens, expected.vision_tokens)
    torch.testing.assert_close(output.logits, expected.logits)


# Words


@GENERATING
@pytest.mark.parametrize("size", [57, 39])
def test_resized_words_train_save_and_load(task, size, tmp_path):
    model, inputs = model_and_inputs(task)
    model.resize_token_embeddings(size)
    output = model(**inputs)
    output.loss.backward()
    assert output.logits.shape[-1] == size == model.config.text_config.vocab_size
    assert model.text_decoder.config is model.config.text_config
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(loaded(**inputs).logits, output.logits)
    assert model.generate(**without_labels(inputs), max_new_tokens=3).shape[0] == 3


@GENERATING
def test_the_heads_bias_is_initialised_where_a_checkpoint_lacks_it(task, tmp_path):
    model, _ = model_and_inputs(task)
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "predictions.bias" not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path)
    assert not loaded.text_decoder.cls.predictions.bias.any()


# Export and compilation where stock BLIP has them


@TASK
def test_with_pruning_off_a_model_exports_and_compiles_in_one_piece(task):
    model = make_task_model(task)
    inputs = question() if task == "vqa" else without_labels(TASKS[task].make_inputs())
    with torch.no_grad():
        expected = scores(model(**inputs))
        program = torch.export.export(model, (), kwargs=inputs, strict=False)
        torch.testing.assert_close(scores(program.module()(**inputs)), expected)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(scores(compiled(**inputs)), expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "task", ["nlvr2", *(pytest.param(task, marks=pytest.mark.slow) for task in ("captioning", "retrieval"))]
)
def test_a_frozen_model_of_every_task_exports_and_compiles(task):
    model, inputs = frozen(task), without_labels(TASKS[task].make_inputs())
    with torch.no_grad():
        expected = scores(model(**inputs))
        program = torch.export.export(model, (), kwargs=inputs, strict=False)
        torch.testing.assert_close(scores(program.module()(**inputs)), expected, atol=1e-5, rtol=1e-5)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(scores(compiled(**inputs)), expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


# Attention maps


@TASK
@TEMPERATURE
def test_eager_attention_puts_out_its_maps(task, temperature):
    model, inputs = model_and_inputs(task, temperature)
    model.set_attn_implementation("eager")
    output = model(**inputs, output_attentions=True)
    tokens = output.vision_tokens.flatten(1)  # of both images of a pair, one after the other
    assert len(output.attentions) == len(tokens) - 1
    for maps, entering in zip(output.attentions, tokens):
        assert maps.shape[-1] == entering.max()
        assert (maps.sum(-1).amax(1).gt(0.99).sum(1).sort().values == entering.sort().values).all()
    # And they are those of the outputs that come without.
    torch.testing.assert_close(scores(output), scores(model(**inputs)), atol=1e-5, rtol=1e-5)


def test_maps_equal_transformers():
    blip = make_task_blip("vqa")
    model = MadtpBlipForQuestionAnswering.from_blip(blip)
    model.set_attn_implementation("eager")
    inputs = make_inputs()
    expected = blip(**inputs, output_attentions=True).attentions
    for mine, theirs in zip(model(**inputs, output_attentions=True).attentions, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@TEMPERATURE
@TASK
def test_with_other_attention_the_maps_are_computed_eagerly_in_that_call(task, temperature, caplog):
    warning_once.cache_clear()
    model, inputs = model_and_inputs(task, temperature)
    output, _ = (model(**inputs, output_attentions=True) for _ in range(2))
    assert caplog.text.count("computed eagerly, in this call alone") == 1
    model.set_attn_implementation("eager")
    for mine, eager in zip(output.attentions, model(**inputs, output_attentions=True).attentions, strict=True):
        torch.testing.assert_close(mine, eager, atol=1e-5, rtol=1e-5)


@GENERATING
def test_generate_puts_out_maps(task):
    model, inputs = model_and_inputs(task)
    options = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    outputs = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        outputs.append(model.generate(pixel_values=inputs["pixel_values"], **_prompt(task, inputs), **options))
    assert len(outputs[0].attentions) == outputs[0].sequences.shape[1] - 1
    for mine, eager in zip(*(output.attentions for output in outputs), strict=True):
        torch.testing.assert_close(mine[0], eager[0], atol=1e-5, rtol=1e-5)


def _prompt(task, inputs):
    return {name: inputs[name] for name in ("input_ids", "attention_mask")} if task == "vqa" else {}


@TASK
def test_some_hidden_states_can_be_asked_for(task):
    model, inputs = model_and_inputs(task, 3.0)
    every = model(**inputs, output_hidden_states=True).hidden_states
    some = model(**inputs, output_hidden_states=[0, -1]).hidden_states
    assert len(some) == len(every) and [states is None for states in some] == [
        False,
        *[True] * (len(every) - 2),
        False,
    ]
    torch.testing.assert_close(some[-1], every[-1])


# Arguments


@TASK
def test_an_argument_that_is_unknown_is_named(task):
    model, inputs = model_and_inputs(task)
    with pytest.raises(TypeError, match="pixel_vlaues"):
        model(**inputs, pixel_vlaues=None)


@GENERATING
def test_targets_that_are_aligned_already(task):
    model, inputs = model_and_inputs(task)
    expected = model(**inputs).task_loss
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(**inputs, shift_labels=shifted).task_loss, expected)


def test_matching_has_a_loss():
    model, inputs = model_and_inputs("retrieval", 3.0)
    inputs.pop("return_loss")
    labels = torch.tensor([0, 1, 1])
    output = model(**inputs, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.itm_score, labels)
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    with pytest.raises(ValueError, match="use_itm_head"):
        model(**inputs, labels=labels, use_itm_head=False)


def test_a_number_without_its_name_is_no_pruning(model):
    with pytest.raises(TypeError, match=r"set_pruning\(reduction=0\.5\).*set_pruning\(temperature=0\.5\)"):
        model.set_pruning(0.5)
    assert not model.is_pruning
    model.set_pruning(None)


# Generation


@GENERATING
def test_generation_settings_are_honoured(task):
    model, inputs = model_and_inputs(task)
    given = {"pixel_values": inputs["pixel_values"], **_prompt(task, inputs)}
    free = model.generate(**given, max_new_tokens=6)
    first = int(free[0, 1])
    ended = model.generate(**given, max_new_tokens=6, eos_token_id=first)
    assert ended.shape[1] <= free.shape[1] and not ended[0, 2:].any()
    assert torch.equal(
        model.generate(**given, generation_config=GenerationConfig(max_new_tokens=6, eos_token_id=first)), ended
    )
    model.generation_config.max_new_tokens, model.generation_config.eos_token_id = 6, first
    assert torch.equal(model.generate(**given), ended)


# Loading


@TASK
def test_auto_model_needs_no_trust_remote_code_with_the_package(task, tmp_path):
    model = make_task_model(task)
    model.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == type(model).__name__
    for config in (model.config, AutoConfig.from_pretrained(tmp_path)):
        made = AutoModel.from_config(config)
        assert type(made) is type(model)
        assert [name for name, _ in made.named_parameters()] == [name for name, _ in model.named_parameters()]

    class OfOnesOwn(type(model)):
        pass

    assert type(OfOnesOwn.from_pretrained(tmp_path)) is OfOnesOwn


@TASK
def test_a_processor_loads_without_our_code(task, tmp_path, monkeypatch, caplog):
    make_task_model(task).save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), BlipProcessor)
    assert "custom code" not in caplog.text


def test_from_blip_hands_on_what_from_pretrained_takes(tmp_path, recwarn):
    make_task_blip("vqa").to(torch.float16).save_pretrained(tmp_path / "models" / "half")
    loaded = MadtpBlipForQuestionAnswering.from_blip(
        tmp_path / "models",
        subfolder="half",
        dtype=torch.float32,
        attn_implementation="eager",
        device_map="cpu",
        local_files_only=True,
        num_alignment_tokens=12,
    )
    assert loaded.dtype == torch.float32 and loaded.config._attn_implementation == "eager"
    assert loaded.config.num_alignment_tokens == 12
    with pytest.raises(TypeError, match="no_such_option"):
        MadtpBlipForQuestionAnswering.from_blip(tmp_path / "models" / "half", no_such_option=1)
    with pytest.raises(TypeError, match=r"revision.*model already"):
        MadtpBlipForQuestionAnswering.from_blip(make_task_blip("vqa"), revision="main")


def test_training_in_half_precision_is_warned_of(caplog):
    import logging

    model = make_task_model("vqa").to(torch.bfloat16).train()
    inputs = make_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers.models.madtp")
    logger.addHandler(handler)
    try:
        model(**inputs)
    finally:
        logger.removeHandler(handler)
    assert any("dtype=torch.float32" in message for message in messages)


# Shapes that broadcast, outputs that don't depend on the batch


@TEMPERATURE
@pytest.mark.parametrize("task", ["vqa", "captioning", "retrieval"])
def test_one_image_with_several_texts_and_several_with_one(task, temperature):
    model, inputs = model_and_inputs(task, temperature)
    inputs = question() if task == "vqa" else without_labels(TASKS[task].make_inputs())
    inputs.pop("return_loss", None)
    one_image = {**inputs, "pixel_values": inputs["pixel_values"][:1]}
    repeated = {**inputs, "pixel_values": inputs["pixel_values"][:1].expand(3, -1, -1, -1)}
    torch.testing.assert_close(scores(model(**one_image)), scores(model(**repeated)), atol=1e-5, rtol=1e-5)
    text = [name for name in ("input_ids", "attention_mask") if name in inputs]
    one_text = {**inputs, **{name: inputs[name][:1] for name in text}}
    repeated = {**inputs, **{name: inputs[name][:1].expand(3, -1) for name in text}}
    torch.testing.assert_close(scores(model(**one_text)), scores(model(**repeated)), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="expected equal numbers"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:2]})


@TASK
@TEMPERATURE
def test_outputs_have_the_same_fields_whatever_the_batch(task, temperature):
    model, _ = model_and_inputs(task, temperature)
    keys = set()
    for lengths in ((9, 5, 7), (7, 7, 7), (9,)):
        inputs = without_labels(TASKS[task].make_inputs(lengths))
        if task == "vqa":
            inputs["decoder_input_ids"] = torch.full((len(lengths), 1), 38)
        output = model(**inputs)
        keys.add(tuple(output.keys()))
        assert output.image_mask.dtype == torch.bool
    assert len(keys) == 1


def test_features_come_with_their_states_on_request():
    model, inputs = model_and_inputs("retrieval", 3.0)
    images = model.get_image_features(inputs["pixel_values"], output_hidden_states=True)
    torch.testing.assert_close(images.pooler_output, model.get_image_features(inputs["pixel_values"]).pooler_output)
    assert len(images.hidden_states) == model.config.vision_config.num_hidden_layers + 1
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    texts = model.get_text_features(**text, token_type_ids=torch.zeros_like(text["input_ids"]))
    torch.testing.assert_close(texts.pooler_output, model.get_text_features(**text).pooler_output)
    assert texts.last_hidden_state.shape[0] == 3


# What can't be


@TASK
def test_a_batch_of_no_samples_is_named(task):
    model, _ = model_and_inputs(task)
    inputs = {name: value[:0] for name, value in without_labels(TASKS[task].make_inputs()).items()}
    if task == "vqa":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with pytest.raises(ValueError, match="holds no image"):
        model(**inputs)


@TASK
@torch.no_grad()
def test_constant_and_broken_images_leave_the_others_alone(task):
    model, _ = model_and_inputs(task, 3.0)
    inputs = question() if task == "vqa" else without_labels(TASKS[task].make_inputs())
    expected = scores(model(**inputs))
    for value in (0.5, float("nan")):
        pixels = inputs["pixel_values"].clone()
        pixels[1] = value
        result = scores(model(**{**inputs, "pixel_values": pixels}))
        for index in (0, 2):
            torch.testing.assert_close(result[index], expected[index], atol=1e-5, rtol=1e-5)


@GENERATING
def test_a_cache_that_the_decoder_cannot_use_is_named(task):
    model, inputs = model_and_inputs(task)
    given = {"pixel_values": inputs["pixel_values"], **_prompt(task, inputs)}
    with pytest.raises(ValueError, match=r"cache_implementation='static'.*does not support it"):
        model.generate(**given, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match=f"assistant_model is a {type(model).__name__}: expected the `text_decoder`"):
        model.generate(**given, max_new_tokens=2, assistant_model=model)


@TASK
def test_arguments_of_transformers_that_change_nothing_are_taken(task):
    model, inputs = model_and_inputs(task)
    inputs.pop("return_loss", None)
    expected = model(**inputs)
    ignored = {"token_type_ids": torch.zeros_like(inputs["input_ids"]), "use_cache": True}
    torch.testing.assert_close(scores(model(**inputs, **ignored)), scores(expected))
    in_a_tuple = model(**inputs, return_dict=False)
    assert type(in_a_tuple) is tuple and len(in_a_tuple) == len(expected.to_tuple())
    with pytest.raises(TypeError, match="got surprise: expected only arguments"):
        model(**inputs, surprise=1)
    if task in ("vqa", "captioning"):
        given = {"pixel_values": inputs["pixel_values"], **_prompt(task, inputs), "max_new_tokens": 3}
        taken = model.generate(**given, token_type_ids=ignored["token_type_ids"])
        assert taken.equal(model.generate(**given))
