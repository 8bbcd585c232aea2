"""The path of devices other than the CPU, run on the CPU: nothing is made on the default device, which there is
another one."""

import pytest
import torch

from madtp_hf import calibrate
from madtp_hf.modeling import chunks

from .conftest import TASKS, make_task_model
from .helpers.devices import no_default_device


LENGTHS = (9, 3, 7, 16)
BEAMS = {"greedy": {}, "beams": {"num_beams": 3, "num_return_sequences": 2}}
# An alignment width of its own, for there to be maps to it; merge layers in NLVR2.
SIZES = {"text_config": {"num_hidden_layers": 7}}

pytestmark = pytest.mark.usefixtures("device_path")


def make_model(task, mode):
    model = make_task_model(task, {"alignment_dim": 16}, **SIZES)
    if mode == "frozen":
        calibrate(model, [TASKS[task].make_inputs(LENGTHS, seed=seed) for seed in range(3)], [0.4], freeze=True)
        model.set_pruning(reduction=0.4)
    elif mode != "off":
        model.config.pruning_granularity = mode
        model.set_pruning(temperature=3.0)
    return model


MODES = pytest.mark.parametrize("mode", ["off", "instance", "batch", "frozen"])


@MODES
@pytest.mark.parametrize("task", TASKS)
def test_a_forward_pass(task, mode, monkeypatch):
    model, inputs = make_model(task, mode), TASKS[task].make_inputs(LENGTHS)
    calls = [{}, {"use_itm_head": False}] if task == "retrieval" else [{}]
    for options in calls:
        options |= {"output_hidden_states": True, "output_positions": True}
        with torch.no_grad(), no_default_device():
            output = model(**inputs, **options)
        counts = output.vision_tokens[-1]
        assert (counts < 37).any() == (mode != "off")
        with monkeypatch.context() as patch:  # and it is what a CPU computes
            patch.setattr(chunks, "CPU_TAKES_CHUNKS", True)
            expected = model(**inputs, **options)
        assert output.keys() == expected.keys()
        for name, value in expected.items():
            tensors = value if isinstance(value, tuple) else (value,)
            mine = output[name] if isinstance(value, tuple) else (output[name],)
            for one, other in zip(mine, tensors, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@MODES
@pytest.mark.parametrize("task", TASKS)
def test_a_training_step(task, mode, monkeypatch):
    model = make_model(task, mode).train()
    inputs = {**TASKS[task].make_inputs(LENGTHS), **TASKS[task].to_train}
    gradients = []
    for takes_chunks in (False, True):
        monkeypatch.setattr(chunks, "CPU_TAKES_CHUNKS", takes_chunks)
        model.zero_grad()
        torch.manual_seed(3)  # hard negatives are drawn
        if takes_chunks:
            model(**inputs).loss.backward()
        else:
            with no_default_device():
                model(**inputs).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[1].items():
        assert gradient.isfinite().all()
        torch.testing.assert_close(
            gradients[0][name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@MODES
@pytest.mark.parametrize("settings", BEAMS.values(), ids=BEAMS)
@pytest.mark.parametrize("task", ["vqa", "captioning", "captioning with a prompt"])
def test_generation(task, settings, mode, monkeypatch):
    task, *prompt = task.split(" with a ")
    model, inputs = make_model(task, mode), TASKS[task].make_inputs(LENGTHS)
    names = ["pixel_values"] if task == "captioning" else ["pixel_values", "input_ids", "attention_mask"]
    inputs = {name: inputs[name] for name in names}
    if prompt:
        inputs["input_ids"] = torch.tensor([[2, 11, 12, 3]] * len(LENGTHS))
    with no_default_device():
        output = model.generate(**inputs, max_new_tokens=5, **settings)
    monkeypatch.setattr(chunks, "CPU_TAKES_CHUNKS", True)
    assert torch.equal(output, model.generate(**inputs, max_new_tokens=5, **settings))


@MODES
def test_what_else_models_do(mode):
    model, inputs = make_model("vqa", mode), TASKS["vqa"].make_inputs(LENGTHS)
    inputs.pop("labels")
    answers = torch.randint(4, 38, (6, 5))
    retrieval = make_model("retrieval", mode)
    with torch.no_grad(), no_default_device():
        assert model.rank_answers(**inputs, answer_input_ids=answers, k=4).shape == (4,)
        assert retrieval.get_image_features(inputs["pixel_values"]).pooler_output.shape[0] == 4
        assert retrieval.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output.shape[0] == 4
        output = retrieval(**inputs)
        again = retrieval.match(inputs["input_ids"], inputs["attention_mask"], output.image_embeds, output.image_mask)
    torch.testing.assert_close(again, output.itm_score, atol=1e-5, rtol=0)
