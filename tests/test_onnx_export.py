"""Exported graphs answer as the model does: with onnxruntime, any batch and length, and without torch."""

import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoProcessor
from transformers.utils.logging import warning_once
from typer.testing import CliRunner

from madtp_hf import calibrate
from madtp_hf.data import load_digit_captions, load_digit_questions
from madtp_hf.modeling import images, texts
from madtp_hf.serving.onnx_export import export_onnx
from madtp_hf.serving.onnx_runner import OnnxModel
from madtp_hf.tasks import TASKS
from madtp_hf_cli import app

from .conftest import make_processor, make_task_blip, make_task_model
from .helpers.clip import make_clip_model, make_clip_processor


for library in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library, reason=f"{library}, of the extra `export`, is not installed")

onnx = pytest.importorskip("onnx")


EXAMPLES = Path(__file__).parents[1] / "examples"
COUNTS = [[1.0, [13], [7, 5]]]
TEXTS = [
    "no",
    "is there a seven?",
    "how many sevens are there?",
    "which digit is the leftmost of the image, the red one or the three?",
    "what color is the three?",
    "a seven",
    "are there two?",
    "which digit?",
]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 70, 3), dtype=np.uint8))


IMAGES = [picture(seed) for seed in range(8)]


def make_small(task: str):
    """A small random model with frozen token counts, and its processor."""
    layers = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 1}}
    model = make_clip_model(**layers) if task == "clip" else make_task_model(task, **layers)
    model.config.pruning_token_counts, model.config.pruning_schedule = COUNTS, [[0.5, 1.0]]
    model.config.pruning_granularity = "frozen"
    model.set_pruning(reduction=0.5)
    return model, make_clip_processor() if task == "clip" else make_processor()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Exports a task's small model once: `exported(task)` -> model, processor, runner."""
    made = {}

    def export(task: str):
        if task not in made:
            model, processor = make_small(task)
            folder = export_onnx(model, processor, tmp_path_factory.mktemp("onnx") / task)
            made[task] = model, processor, OnnxModel(folder)
        return made[task]

    return export


def in_batches(ask, size: int, *columns) -> list:
    return [
        answer
        for start in range(0, len(columns[0]), size)
        for answer in ask(*(column[start : start + size] for column in columns))
    ]


def generate(model, processor, images, texts=None, **options) -> list[str]:
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    written = model.generate(**inputs, do_sample=False, **options)
    return [text.strip() for text in processor.batch_decode(written, skip_special_tokens=True)]


@pytest.mark.parametrize("batch_size", (1, 8))
def test_questions_are_answered_as_by_the_model(exported, batch_size):
    model, processor, graphs = exported("vqa")
    expected = in_batches(lambda *of: generate(model, processor, *of, max_new_tokens=6), batch_size, IMAGES, TEXTS)
    found = in_batches(lambda *of: graphs(*of, max_new_tokens=6), batch_size, IMAGES, TEXTS)
    assert found == expected and len(set(found)) > 1


@pytest.mark.parametrize("batch_size", (1, 8))
def test_captions_are_written_as_by_the_model(exported, batch_size):
    model, processor, graphs = exported("captioning")
    for prompts in ([""] * 8, [text if len(text) < 40 else "the" for text in TEXTS]):
        expected = in_batches(
            lambda *of: generate(model, processor, *of, max_new_tokens=8), batch_size, IMAGES, prompts
        )
        found = in_batches(lambda *of: graphs(*of, max_new_tokens=8), batch_size, IMAGES, prompts)
        assert found == expected
    assert graphs(IMAGES[0], max_new_tokens=8) == generate(model, processor, IMAGES[:1], [""], max_new_tokens=8)


@pytest.mark.slow
def test_sentences_are_judged_as_by_the_model(exported):
    model, processor, graphs = exported("nlvr2")
    pairs = [IMAGES[:2], IMAGES[2:4], IMAGES[4:6]]
    judge = model.as_pipeline(processor)
    expected = [judge(images=pair, text=text) for pair, text in zip(pairs, TEXTS[1:])]
    expected = [{one["label"]: one["score"] for one in of_pair}["True"] for of_pair in expected]
    assert graphs(pairs, TEXTS[1:4]).tolist() == pytest.approx(expected, abs=1e-4)
    assert graphs(pairs[0], TEXTS[1]).tolist() == pytest.approx(expected[:1], abs=1e-4)


@pytest.mark.slow
def test_images_and_texts_are_matched_as_by_the_model(exported):
    model, processor, graphs = exported("retrieval")
    expected = model.as_pipeline(processor)(image=IMAGES[:3], text=TEXTS)
    found = graphs(IMAGES[:3], TEXTS)
    for name in ("score", "similarity"):
        for row, of_image in zip(found[name], expected):
            assert row.tolist() == pytest.approx([one[name] for one in of_image], abs=1e-4)


@pytest.mark.slow
def test_clips_towers_fit_labels_as_the_model(exported):
    model, processor, graphs = exported("clip")
    labels = ["a cat", "dog", "this is a toad, small"]
    inputs = processor(images=IMAGES[:3], text=labels, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.softmax(dim=-1)
    torch.testing.assert_close(torch.from_numpy(graphs(IMAGES[:3], labels)), expected, atol=1e-4, rtol=0)
    alone = graphs(IMAGES[0], labels[0])
    assert alone.shape == (1, 1)


def test_the_description_says_what_is_what(exported):
    _, _, graphs = exported("vqa")
    description = json.loads((graphs.folder / "onnx.json").read_text())
    assert description["task"] == "vqa" and description["token_counts"] == {"vision": [13], "text": [7, 5]}
    assert set(description["graphs"]) == {"vision_encoder", "question_encoder", "decoder"}
    for name, graph in description["graphs"].items():
        session = graphs.sessions[name]
        assert [node.name for node in session.get_inputs()] == list(graph["inputs"])
        assert [node.name for node in session.get_outputs()] == list(graph["outputs"])
    decoder = description["graphs"]["decoder"]["inputs"]
    assert decoder["input_ids"] == {"dtype": "int64", "shape": ["batch", "step"]}
    assert decoder["past_key_values.0.decoder.key"]["shape"] == ["batch", 4, "past", 8]
    assert (graphs.folder / "tokenizer.json").is_file() and (graphs.folder / "onnx_runner.py").is_file()


WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = sys.modules["madtp_hf"] = None  # makes their imports fail
sys.path.insert(0, sys.argv[1])
from onnx_runner import OnnxModel
print("RESULT" + json.dumps(OnnxModel(sys.argv[1])(sys.argv[2], json.loads(sys.argv[3]), max_new_tokens=6)))
"""


def test_the_runner_needs_no_torch(exported, tmp_path):
    _, _, graphs = exported("vqa")
    IMAGES[0].save(tmp_path / "image.png")
    command = [
        sys.executable,
        "-c",
        WITHOUT_TORCH,
        str(graphs.folder),
        str(tmp_path / "image.png"),
        json.dumps(TEXTS[1]),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.rpartition("RESULT")[2])
    assert found == graphs(IMAGES[0], TEXTS[1], max_new_tokens=6)


def test_what_cannot_be_exported_or_run_is_named(exported, tmp_path):
    model, processor = make_small("vqa")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"full exists and is not an empty folder"):
        export_onnx(model, processor, tmp_path / "full")
    with pytest.raises(ValueError, match=r"bfloat16: expected a CPU and torch.float32"):
        export_onnx(model.bfloat16(), processor, tmp_path / "out")
    model = make_task_model("vqa")
    model.set_pruning(temperature=1.0)
    with pytest.raises(ValueError, match=r"depends on its input.*freeze=True.*set_pruning\(None\)"):
        export_onnx(model, processor, tmp_path / "out")
    with pytest.raises(TypeError, match="got a Linear: expected one of madtp_hf's models"):
        export_onnx(torch.nn.Linear(2, 2), processor, tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "full" / "notes.txt").read_text() == "kept"
    with pytest.raises(FileNotFoundError, match=r"has no onnx.json: expected a folder that `madtp-hf export` wrote"):
        OnnxModel(tmp_path)
    graphs = exported("vqa")[2]
    with pytest.raises(ValueError, match="texts is missing"):
        graphs(IMAGES[0])
    with pytest.raises(ValueError, match=r"3 image\(s\) and 2 text\(s\)"):
        graphs(IMAGES[:3], TEXTS[:2])


@pytest.mark.parametrize("task", ("vqa", "captioning", "retrieval"))
def test_texts_too_long_are_refused_or_truncated_when_asked(exported, task, caplog):
    """An answer to another question than the one asked, without a word, is the worst of all."""
    if task == "retrieval":
        model, processor = make_small(task)
        graphs = FakeGraphs(processor, 24)
    else:
        _, _, graphs = exported(task)
    longest = 24 - (task == "captioning")  # a caption adds at least a token to its prompt
    long = "a " * longest + "seven"
    with pytest.raises(
        ValueError, match=rf"A text is {longest + 3} tokens long: this model reads at most {longest}\. "
    ):
        graphs(IMAGES[:2], [long, "a"])
    warning_once.cache_clear()
    truncated = graphs(IMAGES[:2], [long, "a"], truncation=True)
    graphs(IMAGES[:2], [long, "a"], truncation=True)
    assert caplog.text.count(f"more than {longest} tokens") == 1
    if task == "vqa":
        assert truncated == graphs(IMAGES[:2], ["a " * (longest - 2), "a"])


class FakeGraphs(OnnxModel):
    """A runner without graphs, of which only the reading of texts is asked."""

    def __init__(self, processor, longest: int):
        self.processor, self.task = processor, "retrieval"
        self.description = {"max_text_length": longest}

    def read_images(self, images):
        return None

    def _match(self, pixel_values, texts):
        return texts["input_ids"]


def test_images_are_decoded_as_everywhere(exported, tmp_path):
    _, processor, graphs = exported("vqa")
    for module in (images, texts):
        assert (graphs.folder / f"{module.__name__.rpartition('.')[2]}.py").read_text() == inspect.getsource(module)
    levels = np.linspace(0, 65535, 40 * 70).reshape(40, 70).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "16 bits.png")
    clear = picture(1).convert("RGBA")
    clear.putalpha(Image.fromarray((levels // 257).astype(np.uint8)))
    clear.save(tmp_path / "clear.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(2).save(tmp_path / "turned.jpg", exif=turned)
    for file in tmp_path.iterdir():
        expected = processor.image_processor(images.read_image(file), return_tensors="np")["pixel_values"]
        assert np.array_equal(graphs.read_images([file]), expected), file


def test_int8_is_unknown_to_the_runner_and_near(exported, tmp_path):
    """The weights take a quarter, those that decide which tokens stay and the heads are in float32."""
    model, processor = make_small("captioning")
    folder = export_onnx(model, processor, tmp_path / "int8", precision="int8")
    graphs, floats = OnnxModel(folder), exported("captioning")[2]
    assert graphs.description["precision"] == "int8" and floats.description["precision"] == "float32"
    for name, facts in graphs.description["graphs"].items():
        assert 0 < facts["int8_error"] < 0.1, (name, facts["int8_error"])
        kinds = Counter(node.op_type for node in onnx.load(folder / facts["file"]).graph.node)
        assert kinds["MatMulInteger"] > 5, kinds
    vision = onnx.load(folder / "vision_encoder.onnx").graph
    floats = {tensor.name for tensor in vision.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    assert any("alignment" in name for name in floats), floats
    words = next(
        tensor
        for tensor in onnx.load(folder / "decoder.onnx").graph.initializer
        if "word_embeddings" in tensor.name or "predictions" in tensor.name
    )
    assert words.data_type == onnx.TensorProto.FLOAT
    assert len(graphs(IMAGES, max_new_tokens=4)) == len(IMAGES)
    with pytest.raises(ValueError, match=r"precision='int4': expected one of float32, int8"):
        export_onnx(model, processor, tmp_path / "other", precision="int4")


def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
    model = make_task_model("vqa")
    model.set_pruning(temperature=1.0)
    model.save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("kept")
    for arguments, message in (
        (("model", "out"), "depends on its input, which a graph can't: pass --data to calibrate and freeze it"),
        (("model", "full"), "is not empty"),
        (("missing", "out"), "missing does not exist"),
        (("model", "out", "--reduction", "0.5"), "needs a calibrated schedule"),
        (("model", "out", "--images", str(tmp_path / "nowhere")), "nowhere"),
    ):
        paths = [str(tmp_path / name) for name in arguments[:2]]
        result = CliRunner().invoke(app, ["export", *paths, *arguments[2:]])
        assert result.exit_code == 1 and message in result.stderr, result.output
        assert len(result.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


EXPORT = """
import logging, sys
for name in ("torchao", "torch.utils._pytree"):  # the command does so, but it is not running yet
    logging.getLogger(name).setLevel("ERROR")
from madtp_hf.budgets import alignment
alignment.FIT_STEPS = 3
from madtp_hf_cli import app
app(sys.argv[1:])
"""


def test_one_command_takes_a_dense_model_to_graphs(tmp_path):
    """It calibrates, freezes and exports, shows progress, and prints nothing that nobody can act on."""
    make_task_blip("captioning").save_pretrained(tmp_path / "dense")
    make_processor().save_pretrained(tmp_path / "dense")
    (tmp_path / "photos").mkdir()
    for index, image in enumerate(IMAGES):
        image.save(tmp_path / "photos" / f"{index}.png")
    options = ["--images", str(tmp_path / "photos"), "--reductions", "0.4", "--precision", "int8"]
    command = [sys.executable, "-c", EXPORT, "export", str(tmp_path / "dense"), str(tmp_path / "out"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # small operations wait for each other's threads
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(r"image tokens left, int8; run it with", result.stdout), result.stdout
    shown = [line for line in re.split(r"[\r\n]+", result.stderr) if line.strip()]
    bars = [line for line in shown if re.search(r"^\S[\w ]*: .*(it|graphs|batches|passes|steps|s)[/\]]", line)]
    rest = [line for line in shown if line not in bars and not line.startswith("madtp-hf: The schedule rests on")]
    assert not rest and any(line.startswith("exporting: ") for line in bars), rest
    graphs = OnnxModel(tmp_path / "out")
    assert graphs.description["token_counts"] and len(graphs(IMAGES[:2], max_new_tokens=3)) == 2


@pytest.mark.slow
def test_the_command_exports_a_dense_model(tmp_path):
    layers = {"text_config": {"num_hidden_layers": 1}, "vision_config": {"num_hidden_layers": 1}}
    model, processor = make_task_model("vqa", **layers), make_processor()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    result = CliRunner().invoke(app, ["export", str(tmp_path / "model"), str(tmp_path / "out"), "--onnx"])
    assert result.exit_code == 0 and "pruning off" in result.stdout, result.output
    graphs = OnnxModel(tmp_path / "out")
    expected = generate(model, processor, IMAGES, TEXTS, max_new_tokens=4)
    assert graphs(IMAGES, TEXTS, max_new_tokens=4) == expected


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The shipped model of a task, frozen at 0.5 and exported: `digits(task)` -> model, processor, runner."""

    def export(task: str):
        folder = EXAMPLES / f"blip-{task}-digits"
        load = {"vqa": load_digit_questions, "captioning": load_digit_captions}
        model = TASKS[task].model_class.from_blip(str(folder)).float().eval()
        processor = AutoProcessor.from_pretrained(folder)
        collator = TASKS[task].collator(processor, model.config.text_config.bos_token_id)
        calibrate(model, DataLoader(load[task]("validation", 64, 1), 16, collate_fn=collator), [0.5], freeze=True)
        model.set_pruning(reduction=0.5)
        return model, processor, OnnxModel(export_onnx(model, processor, tmp_path_factory.mktemp("digits") / task))

    return export


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The schedule rests on")
def test_64_digit_scenes_are_answered_as_by_the_model(digits):
    pytest.importorskip("sklearn", reason="scikit-learn, of the extra `digits`, is not installed")
    model, processor, graphs = digits("vqa")
    rows = load_digit_questions("test", 64, 3)
    images, questions = list(rows["image"]), list(rows["question"])
    expected = in_batches(lambda *of: generate(model, processor, *of, max_new_tokens=5), 8, images, questions)
    for size in (1, 8):
        assert in_batches(lambda *of: graphs(*of, max_new_tokens=5), size, images, questions) == expected
    assert sum(map(str.__eq__, expected, rows["answer"])) > 48  # these are answers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The schedule rests on")
def test_64_digit_scenes_are_captioned_as_by_the_model(digits):
    pytest.importorskip("sklearn", reason="scikit-learn, of the extra `digits`, is not installed")
    model, processor, graphs = digits("captioning")
    images = list(load_digit_captions("test", 64, 3)["image"])
    for prompts in ([""] * 64, ["a picture of", "a picture of a", "a"] * 21 + ["a picture"]):
        expected = in_batches(lambda *of: generate(model, processor, *of, max_new_tokens=16), 8, images, prompts)
        for size in (1, 8):
            assert in_batches(lambda *of: graphs(*of, max_new_tokens=16), size, images, prompts) == expected
    assert len(set(expected)) > 20
