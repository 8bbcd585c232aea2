"""Check a frozen checkpoint against its recorded outputs, without madtp_hf, pytest or network.

It needs only torch, transformers and Pillow.

python tests/helpers/check_checkpoint.py tests/fixtures/checkpoint-v0.1.0

prints one line per check, "passed" or the error, and finally all of them as JSON; the exit code is 1 if one failed.
"""

import json
import os
import sys
import tempfile
import traceback
from contextlib import contextmanager
from pathlib import Path


INPUTS, OUTPUTS, ANSWER = "recorded_inputs.safetensors", "recorded_outputs.safetensors", "recorded_answer.json"
TOLERANCE = 1e-4


def _forward(model, inputs: dict, *names: str) -> dict:
    import torch

    with torch.no_grad():
        output = model(**inputs)
    return {name: output[name] for name in names}


@contextmanager
def _at_another_budget(model):
    """Prune otherwise, then restore the model's own setting; in version 0.1.0 it was a temperature."""
    name = "pruning_setting" if hasattr(model.config, "pruning_setting") else "pruning_temperature"
    before = getattr(model.config, name)
    yield
    setattr(model.config, name, before)


def pruned(model, inputs: dict) -> dict:
    """Return the outputs with the checkpoint's own settings."""
    return _forward(model, inputs, "logits", "loss", "vision_tokens", "text_tokens")


def pruned_more(model, inputs: dict) -> dict:
    with _at_another_budget(model):
        model.set_pruning(reduction=0.4)
        return _forward(model, inputs, "logits", "vision_tokens", "text_tokens")


def pruning_off(model, inputs: dict) -> dict:
    with _at_another_budget(model):
        model.set_pruning(None)
        return _forward(model, inputs, "logits", "vision_tokens")


def generate(model, inputs: dict) -> dict:
    questions = {name: value for name, value in inputs.items() if name != "labels"}
    return {
        name: model.generate(**questions, max_new_tokens=6, do_sample=False, num_beams=beams)
        for name, beams in (("greedy", 1), ("beams", 3))
    }


def train_step(model, inputs: dict) -> dict:
    """Return the norm of all gradients, and the loss after a step of plain gradient descent.

    The recorded models have no dropout. The model is left unchanged.
    """
    import torch

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(**inputs).loss.backward()
    gradient = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    optimizer.step()
    optimizer.zero_grad()
    outputs = _forward(model.eval(), inputs, "loss")
    model.load_state_dict(before)
    return {"gradient": gradient, **outputs}


RECORDED = {function.__name__: function for function in (pruned, pruned_more, pruning_off, generate, train_step)}


def ask(pipeline) -> list[dict]:
    """Return a pipeline's top answers about a fixed image that is not uniform."""
    from PIL import Image

    image = Image.linear_gradient("L").resize((48, 48)).convert("RGB")
    return pipeline(image=image, question="how many sevens are there?", top_k=3, max_new_tokens=3)


def compare(found: dict, recorded: dict, name: str) -> None:
    """Raise an `AssertionError` unless these tensors equal those recorded as `name`.

    Floats are compared to 1e-4, counts and ids exactly.
    """
    import torch

    for key, tensor in found.items():
        tolerance = TOLERANCE if tensor.is_floating_point() else 0
        expected = recorded[f"{name}.{key}"]
        close = tensor.shape == expected.shape and torch.allclose(tensor, expected, atol=tolerance, rtol=0)
        assert close, f"{name}.{key} is {tensor.flatten().tolist()[:20]}, recorded {expected.flatten().tolist()[:20]}"


def compare_answers(found: list[dict], recorded: list[dict]) -> None:
    """Compare a pipeline's answers with the recorded ones in the same way."""
    assert [answer["answer"] for answer in found] == [answer["answer"] for answer in recorded], (found, recorded)
    for one, other in zip(found, recorded):
        assert abs(one["score"] - other["score"]) < TOLERANCE, (found, recorded)


def load_whole(model_class, folder: Path, **options):
    """Load the model and check that no key is missing or unexpected."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    amiss = {name: keys for name, keys in info.items() if name.endswith("_keys") and keys}
    assert not amiss, amiss
    return model


def main(folder: Path) -> int:
    sys.modules["madtp_hf"] = None  # makes importing it fail
    os.environ["HF_HUB_OFFLINE"] = "1"
    scratch = tempfile.TemporaryDirectory(prefix="madtp-hf-")
    os.environ["HF_MODULES_CACHE"] = str(Path(scratch.name, "modules"))
    import torch
    import transformers
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoModelForVisualQuestionAnswering, AutoProcessor, pipeline

    torch.set_num_threads(1)
    inputs, recorded = load_file(folder / INPUTS), load_file(folder / OUTPUTS)
    loaded = []

    def load():
        for auto_class in (AutoModelForVisualQuestionAnswering, AutoModel):
            model = load_whole(auto_class, folder, trust_remote_code=True)
            assert type(model).__module__.startswith("transformers_modules."), type(model)
        loaded.append(model)

    def answer():
        answers = ask(pipeline("visual-question-answering", model=str(folder), trust_remote_code=True))
        compare_answers(answers, json.loads((folder / ANSWER).read_text()))

    def save_and_load():
        again = Path(scratch.name, "again")
        loaded[0].save_pretrained(again)
        AutoProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(again)
        compare(pruned(load_whole(AutoModel, again, trust_remote_code=True), inputs), recorded, "pruned")

    checks = {"load": load, "pipeline": answer}
    for name, function in RECORDED.items():
        checks[name] = lambda name=name, function=function: compare(function(loaded[0], inputs), recorded, name)
    checks["save_and_load"] = save_and_load
    found = {}
    print(f"{folder.name}, transformers {transformers.__version__}, torch {torch.__version__}")
    for name, check in checks.items():
        try:
            check()
            found[name] = "passed"
        except Exception as error:  # another version may raise anything; the other checks must still run
            if not loaded and name not in ("load", "pipeline"):
                found[name] = "not run, nothing was loaded"
            else:
                traceback.print_exc()
                found[name] = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        print(f"  {name}: {found[name]}")
    print(json.dumps(found))
    scratch.cleanup()
    return int(any(result != "passed" for result in found.values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
