"""Frozen token counts, and what static shapes are for: export, ONNX; and compilation of what is not frozen."""

import pytest
import torch

from madtp_hf import MadtpBlipForQuestionAnswering, calibrate
from madtp_hf.budgets.passes import measure

from .conftest import TASKS, make_inputs, make_task_model, one_sample


def frozen(name, reductions=(0.35, 0.5)):
    model = make_task_model(name)
    calibrate(model, [TASKS[name].make_inputs(seed=seed) for seed in range(6)], list(reductions), freeze=True)
    model.set_pruning(reduction=reductions[-1])
    return model


def without_labels(inputs):
    return {name: tensor for name, tensor in inputs.items() if name != "labels"}


def question(seed=0, lengths=(9, 5, 7)):
    inputs = without_labels(make_inputs(lengths, seed))
    return {**inputs, "decoder_input_ids": torch.full((len(lengths), 1), 38)}


def scores(output):
    return next(output[name] for name in ("logits", "itm_score") if output.get(name) is not None)


@pytest.mark.parametrize("name", TASKS)
def test_a_frozen_model_leaves_the_numbers_that_were_fixed_and_saves_what_was_asked(name):
    task = TASKS[name]
    model = frozen(name)
    counts = {entry["temperature"]: (entry["vision"], entry["text"]) for entry in model.config.pruning_token_counts}
    vision, text = counts[model.config.pruning_temperature]
    reductions = []
    for seed in range(6, 10):
        inputs = task.make_inputs(seed=seed)
        output = model(**inputs)
        assert (output.vision_tokens.flatten(1).T[:, 1:] == torch.tensor(vision)).all()
        if output.text_tokens is not None:
            assert (output.text_tokens[1:] <= output.text_tokens[:1].clamp(max=torch.tensor(text)[:, None])).all()
        reductions.append(measure(model, inputs, output))
    assert torch.cat(reductions).mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("name", TASKS)
def test_a_frozen_output_depends_neither_on_its_batch_nor_on_padding(name):
    model = frozen(name)
    inputs = question() if name == "vqa" else without_labels(TASKS[name].make_inputs())
    together = scores(model(**inputs))
    longer = {
        key: torch.nn.functional.pad(value, (0, 3)) if key in ("input_ids", "attention_mask") else value
        for key, value in inputs.items()
    }
    padded = scores(model(**longer))
    # A caption's scores are of every token: those of padding say nothing.
    lengths = inputs["attention_mask"].sum(1).tolist() if name == "captioning" else [None] * 3
    for index, length in enumerate(lengths):
        expected = together[index, :length]
        torch.testing.assert_close(padded[index, :length], expected, atol=1e-4, rtol=1e-4)
        alone = scores(model(**one_sample(inputs, index)))
        torch.testing.assert_close(alone[0], expected, atol=1e-4, rtol=1e-4)


def test_a_frozen_model_is_saved_and_loaded(tmp_path):
    model = frozen("vqa")
    model.save_pretrained(tmp_path)
    loaded = MadtpBlipForQuestionAnswering.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**question()).logits, model(**question()).logits)


def test_only_frozen_reductions_can_be_asked_for_and_instance_gives_the_others_back():
    model = frozen("vqa")
    model.set_pruning(None)
    with pytest.raises(ValueError, match=r"no token counts for temperature .* freeze=True"):
        model.set_pruning(reduction=0.42)
    assert model.config.pruning_temperature == 0
    model.config.pruning_granularity = "instance"
    model.set_pruning(reduction=0.42)
    counts = model(**question()).vision_tokens[-1]
    assert counts.unique().numel() > 1


def test_thresholds_of_one_temperature_have_counts_of_their_own(model):
    config = model.config
    layers = (config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers)
    many, few = ([[number] * count for count in layers] for number in (9, 5))
    config.pruning_token_counts = [[1.0, *many, 0.5], [1.0, *few]]
    config.pruning_schedule = [[0.2, 1.0, 0.5], [0.4, 1.0]]
    config.pruning_granularity = "frozen"
    for reduction, number in ((0.2, 9), (0.4, 5)):
        model.set_pruning(reduction=reduction)
        with torch.no_grad():
            assert (model(**question()).vision_tokens[1:] == number).all()
    with pytest.raises(
        ValueError, match=r"temperature 1\.0 with factor 0\.7.*temperature 1\.0 with factor 0\.5, temperature 1\.0\]"
    ):
        model.set_pruning(temperature=1.0, factor=0.7)


def test_small_reductions_are_frozen_as_well():
    model = make_task_model("vqa", text_config={"num_hidden_layers": 2})
    batches = [TASKS["vqa"].make_inputs(seed=seed) for seed in range(4)]
    calibrate(model, batches, [0.05, 0.1, 0.5], freeze=True)
    for reduction in (0.05, 0.1, 0.5):
        model.set_pruning(reduction=reduction)
        with torch.no_grad():
            reached = torch.cat([measure(model, batch, model(**batch)) for batch in batches]).mean().item()
        assert reached == pytest.approx(reduction, abs=0.02)


def test_without_counts_frozen_says_what_to_do(model):
    model.config.pruning_granularity = "frozen"
    with pytest.raises(ValueError, match="calibrate"):
        model.set_pruning(temperature=1.0)


def test_an_exported_model_takes_any_batch():
    model = frozen("vqa")
    batch = torch.export.Dim("batch", min=2, max=64)
    inputs = question()
    program = torch.export.export(
        model, (), kwargs=inputs, dynamic_shapes={name: {0: batch} for name in inputs}, strict=False
    )
    other = question(seed=3, lengths=(4, 9, 8, 5, 9))
    torch.testing.assert_close(program.module()(**other).logits, model(**other).logits)


def test_onnx_runtime_gives_what_torch_gives(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx needs, is not installed")
    model = frozen("vqa")
    torch.onnx.export(model, (), kwargs=question(), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    other = question(seed=3, lengths=(8, 9, 4))
    feed = {node.name: other[node.name].numpy() for node in session.get_inputs()}
    expected = model(**other)
    outputs = {output.shape: output for output in map(torch.from_numpy, session.run(None, feed))}
    torch.testing.assert_close(outputs[expected.logits.shape], expected.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_compilation_stops_when_token_counts_go_on_changing():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = make_task_model("vqa", text_config={"num_hidden_layers": 1}, vision_config={"num_hidden_layers": 2})
    model.set_pruning(temperature=0.3)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    seen, frames = set(), []
    with torch.no_grad():
        for seed, lengths in enumerate([(9, 5, 7), (8, 8, 6), (7, 9, 4), (6, 5, 8), (9, 9, 4), (5, 8, 9), (7, 6, 9)]):
            inputs = question(seed, lengths)
            expected = model(**inputs)
            output = compiled(**inputs)
            torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)
            assert torch.equal(output.vision_tokens, expected.vision_tokens)
            seen.add(int(expected.vision_tokens[-1].sum()))
            frames.append(counter.frame_count)
    assert len(seen) > 4
    # What is still compiled after a few batches are cases apart: a layer that drops nothing, samples that happen to be
    # of one length.
    assert frames[-1] - frames[2] <= 2
    torch._dynamo.reset()


def test_a_frozen_model_compiles_once_and_in_one_piece():
    model = frozen("vqa")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for seed in range(3):
            inputs = question(seed)
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


def test_evaluation_is_of_the_frozen_model_itself():
    from madtp_hf.budgets.passes import restored

    model = frozen("vqa")
    with restored(model):
        assert model.config.pruning_granularity == "frozen"
        model.set_pruning(reduction=0.35)
    assert model.config.pruning_setting == model.setting_for(0.5)


def test_short_texts_freeze_to_valid_counts():
    model = make_task_model("vqa")
    calibrate(model, [make_inputs((2, 2, 3), seed) for seed in range(4)], [0.4], freeze=True)
    model.set_pruning(reduction=0.4)
    model(**question(lengths=(2, 9, 3)))


def test_training_with_the_callback_asks_for_what_is_not_frozen():
    from madtp_hf import ReductionCallback

    with pytest.raises(ValueError, match="pruning_granularity"):
        ReductionCallback(0.5).on_train_begin(None, None, None, model=frozen("vqa"))


# What is exported to answer is tested for every task in test_onnx_export.py.
@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_onnx_takes_other_batches_and_lengths(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx needs, is not installed")
    model, task = frozen(name), TASKS[name]
    make = question if name == "vqa" else lambda seed, lengths: without_labels(task.make_inputs(lengths, seed))
    # A caption's length stays what it was exported with.
    inputs, other = make(0, (9, 5, 7)), make(3, (9, 6, 4, 8) if name == "captioning" else (8, 6, 4, 8))
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=4, max=20)
    texts = () if name == "captioning" else ("input_ids", "attention_mask")
    shapes = {key: {0: batch, 1: length} if key in texts else {0: batch} for key in inputs}
    program = torch.onnx.export(model, (), kwargs=inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    feed = {node.name: other[node.name].numpy() for node in session.get_inputs()}
    expected = scores(model(**other))
    outputs = [torch.from_numpy(output) for output in session.run(None, feed)]
    same_shape = [output for output in outputs if output.shape == expected.shape]
    assert any(torch.allclose(output, expected, atol=1e-4) for output in same_shape)
