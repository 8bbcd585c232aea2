"""A saved checkpoint, used where this package cannot be imported."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from madtp_hf import calibrate
from madtp_hf.budgets.calibration import measure_reduction

from .conftest import TASKS, make_inputs, make_task_blip


WITHOUT_PACKAGE = """
import json, sys
sys.modules["madtp_hf"] = None  # makes its import fail
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForVisualQuestionAnswering, AutoProcessor, pipeline
folder, task = sys.argv[1:3]
try:
    import madtp_hf
except ImportError:
    pass
else:
    raise SystemExit("madtp_hf could be imported")
"""


def run(code, *arguments, cache):
    import os

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    printed = result.stdout.splitlines()[-1]  # behind the loader's question, where it asks one
    return json.loads(printed[printed.index("RESULT") + len("RESULT") :])


@pytest.fixture
def checkpoint(model, processor, tmp_path):
    model.config.pruning_schedule = [[0.4, 1.0], [0.6, 4.0]]
    model.set_pruning(reduction=0.5)
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_checkpoint_is_complete(checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "modeling_madtp_blip.py",
        "configuration_madtp_blip.py",
        "token_pruning.py",
        "pipeline_madtp_blip.py",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= names
    assert not any(name.endswith((".bin", ".pth", ".pt", ".pkl")) for name in names)
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["model_type"] == "madtp_blip"
    assert config["architectures"] == ["MadtpBlipForQuestionAnswering"]
    assert config["auto_map"]["AutoModel"] == config["auto_map"]["AutoModelForVisualQuestionAnswering"]
    assert set(config["custom_pipelines"]) == {"visual-question-answering"}


def test_it_loads_and_answers_without_the_package(checkpoint, model, processor, tmp_path):
    inputs = make_inputs()
    with torch.no_grad():
        expected = model(**inputs).logits
    image = Image.effect_noise((48, 48), 90).convert("RGB")
    image.save(tmp_path / "image.png")
    torch.save(inputs, tmp_path / "inputs.pt")
    result = run(
        """
inputs = torch.load(sys.argv[3], weights_only=True)
logits = []
for auto in (AutoModel, AutoModelForVisualQuestionAnswering):
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert type(model).__name__ == "MadtpBlipForQuestionAnswering", type(model)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        logits.append(model(**inputs).logits.tolist())
model.set_pruning(reduction=0.6)
assert model.config.pruning_temperature == 4.0
again = sys.argv[4] + "/again"  # and what was loaded saves as completely
model.save_pretrained(again)
AutoProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(again)
answers = []
for source in (folder, again):
    ask = pipeline("visual-question-answering", model=source, trust_remote_code=True)
    ask.model.set_pruning(reduction=0.5)
    image, question = sys.argv[4] + "/image.png", "how many sevens are there?"
    answers.append([
        ask(image=image, question=question),
        ask({"image": image, "question": question}),
        ask(image=image, question=question, top_k=3),
        ask([{"image": image, "question": question}, {"image": image, "question": "is there a seven?"}]),
        ask(image=[image, image], question=[question, "is there a seven?"], batch_size=3),
    ])
def same(mine, theirs):  # to rounding: two copies of a model lie differently in memory
    if isinstance(mine, list):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    return mine["answer"] == theirs["answer"] and abs(mine["score"] / theirs["score"] - 1) < 1e-3
assert same(*answers), answers
print("RESULT" + json.dumps({"logits": logits, "answers": answers[0]}))
""",
        checkpoint,
        "vqa",
        tmp_path / "inputs.pt",
        tmp_path,
        cache=tmp_path / "modules",
    )
    for logits in result["logits"]:
        torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-5, rtol=0)
    one, as_dict, three, listed, product = result["answers"]
    assert len(one) == 1 and set(one[0]) == {"answer", "score"} and 0 < one[0]["score"] <= 1
    assert as_dict[0]["answer"] == one[0]["answer"] and as_dict[0]["score"] == pytest.approx(one[0]["score"], rel=1e-3)
    assert len(three) == 3 and [a["score"] for a in three] == sorted((a["score"] for a in three), reverse=True)
    assert len(listed) == 2 and listed[0][0]["answer"] == one[0]["answer"]
    assert len(product) == 4
    assert product[0][0]["score"] == pytest.approx(
        product[1][0]["score"], rel=1e-3
    )  # the same question, the same image twice
    assert product[2][0]["score"] == pytest.approx(listed[1][0]["score"], rel=1e-3)  # the other question
    assert product[0][0]["answer"] == one[0]["answer"] and product[0][0]["score"] == pytest.approx(
        one[0]["score"], abs=1e-4
    )
    # In this process, from memory: the same.
    ask = model.as_pipeline(processor)
    mine = ask(image=image, question="how many sevens are there?")
    assert mine[0]["answer"] == one[0]["answer"] and mine[0]["score"] == pytest.approx(one[0]["score"], abs=1e-5)


AUTO_CLASSES = {
    "vqa": ["AutoModel", "AutoModelForVisualQuestionAnswering"],
    "captioning": ["AutoModel", "AutoModelForImageTextToText"],
    "nlvr2": ["AutoModel"],
    "retrieval": ["AutoModel"],
}


PIPELINES = {
    "vqa": "visual-question-answering",
    "captioning": "image-to-text",
    "nlvr2": "images-and-text-classification",
    "retrieval": "image-text-retrieval",
}


def test_the_whole_way_of_every_task(processor, tmp_path):
    """transformers' BLIP on disk -> ours -> calibrated -> saved -> loaded, all of it, where this package is not."""
    expected, inputs = {}, {}
    for task, auto_classes in AUTO_CLASSES.items():
        dense, folder = tmp_path / f"{task}-dense", tmp_path / task
        # A text stack with a merge layer for NLVR2; and a vision encoder that outweighs it.
        make_task_blip(
            task,
            text_config={"num_hidden_layers": 7 if task == "nlvr2" else 2},
            vision_config={"num_hidden_layers": 6},
        ).save_pretrained(dense)
        model = TASKS[task].model_class.from_blip(dense, num_alignment_tokens=12)
        batches = [TASKS[task].make_inputs((9, 5, 7, 12), seed=seed) for seed in range(3)]
        calibrate(model, batches, [0.5])
        model.set_pruning(reduction=0.5)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        assert measure_reduction(model, batches, **model.setting_for(0.5)) == pytest.approx(0.5, abs=0.01)

        names = {path.name for path in folder.iterdir()}
        code = {
            "configuration_madtp_blip",
            "modeling_madtp_blip",
            "encoder",
            "sequences",
            "retrieval_loss",
            "token_pruning",
        }
        assert {"config.json", "model.safetensors", "tokenizer.json", *(f"{name}.py" for name in code)} <= names
        assert not any(name.endswith((".bin", ".pth", ".pt", ".pkl")) for name in names)
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == [type(model).__name__] and config["model_type"] == "madtp_blip"
        assert set(config["auto_map"]) == {"AutoConfig", *auto_classes}
        assert set(config["custom_pipelines"]) == {PIPELINES[task]}

        inputs[task] = {name: value for name, value in batches[0].items() if name != "labels" or task == "vqa"}
        with torch.no_grad():
            output = model(**inputs[task])
        expected[task] = {
            "scores": output[TASKS[task].scores].tolist(),
            "image_embeds": output.image_embeds.tolist(),
            "vision_tokens": output.vision_tokens.tolist(),
        }
        if task == "captioning":
            captions = model.generate(inputs[task]["pixel_values"], max_new_tokens=5, num_beams=2)
            expected[task]["captions"] = captions.tolist()
    torch.save(inputs, tmp_path / "inputs.pt")
    tasks = {task: [auto_classes, TASKS[task].scores] for task, auto_classes in AUTO_CLASSES.items()}
    result = run(
        """
everything = torch.load(folder + "/inputs.pt", weights_only=True)
results = []
for task, (auto_classes, scores) in json.loads(task).items():
    for auto in auto_classes:
        model, info = getattr(transformers, auto).from_pretrained(
            folder + "/" + task, trust_remote_code=True, output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert type(model).__module__.startswith("transformers_modules"), type(model)
        AutoProcessor.from_pretrained(folder + "/" + task, trust_remote_code=True)
        inputs = everything[task]
        with torch.no_grad():
            output = model(**inputs)
        result = {"scores": output[scores].tolist()}
        result.update({name: output[name].tolist() for name in ("image_embeds", "vision_tokens")})
        if task == "captioning":
            result["captions"] = model.generate(inputs["pixel_values"], max_new_tokens=5, num_beams=2).tolist()
        model.set_pruning(None)  # and off is off
        with torch.no_grad():
            assert (model(**inputs).vision_tokens == 37).all()
        results.append([task, type(model).__name__, result])
print("RESULT" + json.dumps(results))
""",
        tmp_path,
        json.dumps(tasks),
        cache=tmp_path / "modules",
    )
    assert [task for task, *_ in result] == [task for task, autos in AUTO_CLASSES.items() for _ in autos]
    for task, name, got in result:
        assert name == TASKS[task].model_class.__name__
        assert set(got) == set(expected[task])
        for key in got:
            mine, theirs = torch.tensor(got[key]), torch.tensor(expected[task][key])
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


def test_a_score_is_the_probability_of_the_answer(model, processor):
    ask = model.as_pipeline(processor)
    image = Image.effect_noise((48, 48), 90).convert("RGB")
    answers = ask(image=image, question="how many sevens are there?", top_k=4, max_new_tokens=2)
    inputs = processor(images=image, text="how many sevens are there?", return_tensors="pt")
    sequences = model.generate(**inputs, max_new_tokens=2, num_beams=4, num_return_sequences=4)
    with torch.no_grad():
        logits = model(**{k: v.expand(4, *v.shape[1:]) for k, v in inputs.items()}, decoder_input_ids=sequences).logits
    log_probs = logits[:, :-1].log_softmax(-1).gather(-1, sequences[:, 1:, None]).squeeze(-1)
    expected = log_probs.masked_fill(sequences[:, 1:] == 0, 0).sum(1).exp()
    assert sorted(a["score"] for a in answers) == pytest.approx(sorted(expected.tolist()), rel=1e-4)


def test_without_trust_remote_code_the_loader_refuses(checkpoint, tmp_path):
    message = run(
        """
messages = []
for loader in (AutoConfig, AutoModel, AutoModelForVisualQuestionAnswering):
    try:
        loader.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        messages.append(str(error))
try:
    pipeline("visual-question-answering", model=folder)
except (ValueError, KeyError) as error:
    messages.append(str(error))
print("RESULT" + json.dumps(messages))
""",
        checkpoint,
        "vqa",
        cache=tmp_path / "modules",
    )
    assert len(message) == 4 and all("trust_remote_code" in m for m in message)


def test_modeling_imports_nothing_of_the_package():
    from pathlib import Path

    import madtp_hf.modeling

    for path in Path(madtp_hf.modeling.__file__).parent.glob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.strip().startswith(("from ..", "import madtp_hf", "from madtp_hf")), (path, line)


def test_pipeline_names_what_is_missing(model, processor):
    ask = model.as_pipeline(processor)
    image = Image.new("RGB", (48, 48))
    with pytest.raises(ValueError, match="question is missing"):
        ask(image=image)
    with pytest.raises(ValueError, match="image is missing"):
        ask(question="how many?")
    with pytest.raises(ValueError, match="top_k=0"):
        ask(image=image, question="how many?", top_k=0)
    with pytest.raises(TypeError, match="topk"):
        ask(image=image, question="how many?", topk=2)
