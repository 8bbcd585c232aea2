"""`madtp-hf prune`, `evaluate` and `benchmark` on tiny random models."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer


pytest.importorskip("typer", reason="the command needs typer: pip install 'madtp_hf[cli]'")
from typer.testing import CliRunner

from madtp_hf.budgets.benchmark import stock_model
from madtp_hf.checkpoints.load import load
from madtp_hf.checkpoints.push import find_checkpoint_files
from madtp_hf.data.rows import load_rows
from madtp_hf.tasks import TASKS
from madtp_hf_cli import app

from .conftest import TASKS as TEST_TASKS
from .conftest import close, make_processor, make_task_blip, make_task_model


QUESTION = "how many sevens are there?"


@pytest.fixture(scope="module", autouse=True)
def few_fitting_steps():
    """What the alignment tokens are fitted to is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("madtp_hf.budgets.alignment.FIT_STEPS", 3)
        yield


def invoke(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six images of different busyness, one in a subfolder, and a file that is none."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    (folder / "more").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for index in range(6):
        pixels = torch.rand(4 + 8 * index, 4 + 8 * index, 3, generator=generator).mul(255).byte().numpy()
        name = f"more/{index}.png" if index == 5 else f"{index}.png"
        Image.fromarray(pixels).resize((48, 48)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A folder with a dense checkpoint of each of BLIP's tasks, as transformers saves it; NLVR2's is ours."""
    folder = tmp_path_factory.mktemp("dense")
    for task in TEST_TASKS:
        model = make_task_model(task) if task == "nlvr2" else make_task_blip(task)
        model.save_pretrained(folder / task)
        make_processor().save_pretrained(folder / task)
    return folder


@pytest.fixture(scope="module")
def pruned(dense, photos, tmp_path_factory):
    """A pruned question answering checkpoint, as the command wrote it."""
    out = tmp_path_factory.mktemp("pruned") / "vqa"
    result = invoke(
        "prune", dense / "vqa", out, "--data", photos, "--question", QUESTION, "--reductions", "0.4", "0.2"
    )
    assert result.exit_code == 0, result.stderr
    return out, result


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_prune_writes_a_calibrated_checkpoint_that_publishes(dense, pruned):
    out, result = pruned
    assert "reduction asked" in result.stdout and "GFLOPs" in result.stdout and "Nothing was trained" in result.stdout
    assert "rests on 6 samples" in result.stderr and "Traceback" not in result.stderr
    find_checkpoint_files(out)  # complete
    card = ModelCard.load(out / "README.md").text
    assert "without training" in card and re.search(r"\| 0.4 \| \d+\.\d% \|", card) and str(dense) not in card
    model = AutoModel.from_pretrained(out)
    assert model.config.calibrated_reductions == [0.2, 0.4]
    assert model.config.pruning_setting == model.setting_for(0.4)
    theirs = load(dense / "vqa").model
    for name, tensor in theirs.state_dict().items():
        if not name.startswith("alignment."):
            close(model.state_dict()[name], tensor, atol=0)


@pytest.mark.parametrize("task", ["captioning", "nlvr2", "retrieval"])
def test_prune_takes_each_task(task, dense, photos, tmp_path):
    text = [] if task == "captioning" else ["--text", "the image of a red seven"]
    result = invoke("prune", dense / task, tmp_path / "out", "--data", photos, *text, "--reductions", "0.4")
    assert result.exit_code == 0, result.stderr
    loaded = load(tmp_path / "out")
    model = loaded.model
    assert model.task == loaded.task.name == task and not loaded.is_dense
    assert model.config.calibrated_reductions[0] == 0.4


def test_prune_freezes_what_each_layer_keeps(dense, photos, tmp_path):
    arguments = dense / "vqa", tmp_path / "out", "--data", photos, "--question", QUESTION, "--reductions", "0.2"
    result = invoke("prune", *arguments, "--freeze")
    assert result.exit_code == 0, result.output
    model = TASKS["vqa"].model_class.from_pretrained(tmp_path / "out")
    assert model.config.pruning_granularity == "frozen" and model.is_pruning
    assert model.start_pass().token_counts is not None


def test_prune_takes_clip_from_a_table_of_captions(photos, tmp_path):
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config={**layers, **ends, "vocab_size": len(words), "max_position_embeddings": 24},
        vision_config={**layers, "image_size": 48, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    size = {"height": 48, "width": 48}
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=size), tokenizer).save_pretrained(
        tmp_path / "clip"
    )
    rows = [{"file_name": f"{index}.png", "caption": f"a red {'x' * index} seven"} for index in range(5)]
    table = write_csv(tmp_path / "captions.csv", rows)
    data = "--data", table, "--image-dir", photos
    result = invoke("prune", tmp_path / "clip", tmp_path / "out", *data, "--reductions", 0.1)
    assert result.exit_code == 0, result.stderr
    pytest.importorskip("evaluate", reason="metrics need evaluate: pip install 'madtp_hf[metrics]'")
    result = invoke("evaluate", tmp_path / "out", *data, "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["reduction asked"] for row in content["results"]] == [0, 0.1] and content["metric"] == "mean %"


def test_unreadable_images_stop_the_command_or_are_left_out_and_counted(pruned, photos, tmp_path):
    (tmp_path / "photos").mkdir()
    for index in range(4):
        (tmp_path / "photos" / f"{index}.png").write_bytes((photos / f"{index}.png").read_bytes())
    (tmp_path / "photos" / "2.png").write_text("broken")
    data = "--data", tmp_path / "photos", "--question", QUESTION, "--reductions", 0.3
    stopped = invoke("prune", pruned[0], tmp_path / "out", *data, "--batch-size", 1)
    assert stopped.exit_code == 1 and "2.png" in stopped.stderr and not (tmp_path / "out").exists()
    left_out = invoke("prune", pruned[0], tmp_path / "out", *data, "--skip-unreadable")
    assert left_out.exit_code == 3, left_out.stderr
    assert "Left out 1 of the rows" in left_out.stderr and "calibrated on 3 samples" in left_out.stdout
    timed = "--rounds", 1, "--batch-sizes", 1, "--out", tmp_path / "speed.json", "--skip_unreadable"
    result = invoke("benchmark", pruned[0], "--data", tmp_path / "photos", "--text", QUESTION, *timed)
    assert result.exit_code == 3 and (tmp_path / "speed.json").exists()


def test_columns_have_the_names_that_are_given(pruned, photos, tmp_path):
    rows = [{"photo": f"{index}.png", "query": QUESTION} for index in range(3)]
    table = write_csv(tmp_path / "table.csv", rows)
    data = "--data", table, "--image-dir", photos, "--reductions", 0.3
    refused = invoke("prune", pruned[0], tmp_path / "out", *data)
    assert refused.exit_code == 1 and "--columns image=" in refused.stderr, refused.stderr
    result = invoke("prune", pruned[0], tmp_path / "out", *data, "--columns", "image=photo", "question=query")
    assert result.exit_code == 0, result.stderr


def test_prune_again_keeps_alignment_tokens_that_were_learned(pruned, photos, tmp_path):
    out, _ = pruned
    data = "--data", photos, "--question", QUESTION, "--reductions", "0.3"
    assert invoke("prune", out, tmp_path / "again", *data).exit_code == 0
    before, after = (load(folder).model.alignment.tokens for folder in (out, tmp_path / "again"))
    close(after, before, atol=0)
    other = "--data", photos, "--question", "is the leftmost digit red?", "--reductions", "0.3", "--alignment", "fit"
    assert invoke("prune", out, tmp_path / "new", *other).exit_code == 0
    assert not torch.equal(load(tmp_path / "new").model.alignment.tokens, before)


def test_evaluate_gives_the_metric_at_each_budget(pruned, photos, tmp_path):
    pytest.importorskip("evaluate", reason="metrics need evaluate: pip install 'madtp_hf[metrics]'")
    loaded = load(pruned[0])
    model, processor = loaded.model, loaded.processor
    model.set_pruning(None)
    image = processor(images=Image.open(photos / "0.png"), text=QUESTION, return_tensors="pt")
    written = processor.tokenizer.decode(model.generate(**image, max_new_tokens=10)[0], skip_special_tokens=True)
    rows = [
        {"image": "0.png", "question": QUESTION, "answers": json.dumps([written] * 10)},
        {"image": "more/5.png", "question": QUESTION, "answers": json.dumps(["nobody says this"] * 10)},
    ]
    table = write_csv(tmp_path / "questions.csv", rows)
    arguments = "evaluate", pruned[0], "--data", table, "--image-dir", photos, "--out", tmp_path
    result = invoke(*arguments, "--batch-size", 1)
    assert result.exit_code == 0, result.stderr
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["reduction asked"] for row in content["results"]] == [0, 0.2, 0.4]
    assert content["results"][0]["accuracy %"] == 0.5  # one of the two is what the model says
    costs = [row["GFLOPs"] for row in content["results"]]
    assert costs[0] > costs[1] > costs[2] and content["dataset"]["name"] == "questions.csv"
    assert "results.json exists: " in invoke(*arguments).stderr


def test_benchmark_times_every_budget_beside_transformers(pruned, photos, tmp_path):
    out = tmp_path / "speed.json"
    result = invoke("benchmark", pruned[0], "--data", photos, "--batch-sizes", 1, 3, "--rounds", 1, "--out", out)
    assert result.exit_code == 0, result.stderr
    content = json.loads(out.read_text())
    named = [(row["batch size"], row["run"]) for row in content["results"]]
    assert named == [(size, run) for size in (1, 3) for run in ("transformers", "pruning off", "0.2", "0.4")]
    for row in content["results"]:
        assert row["milliseconds"] > 0 and row["samples/s"] == pytest.approx(
            1000 * row["batch size"] / row["milliseconds"]
        )
        assert row["memory MB"] is None or row["memory MB"] >= 0
    reached = [row["reached"] for row in content["results"][4:]]
    assert reached[:2] == [0, 0] and 0 < reached[2] < reached[3] < 1 and content["images"] == "photos"


def test_benchmark_calibrates_what_is_not_and_does_without_images(dense, tmp_path):
    out = tmp_path / "speed.json"
    result = invoke("benchmark", dense / "nlvr2", "--reductions", 0.4, "--batch-sizes", 1, "--rounds", 1, "--out", out)
    assert result.exit_code == 0, result.stderr
    content = json.loads(out.read_text())
    assert [row["run"] for row in content["results"]] == ["pruning off", "0.4"]  # transformers has no NLVR2
    assert content["calibrated here"] and content["images"] == "noise"


@pytest.mark.parametrize("task", [task for task in TEST_TASKS if task != "nlvr2"])
def test_the_stock_model_is_transformers_model_with_the_same_outputs(task):
    model = make_task_model(task).eval()
    twin = stock_model(model)
    assert type(twin).__module__.startswith("transformers.")
    inputs, name = TEST_TASKS[task].make_inputs(), TEST_TASKS[task].scores
    if task == "vqa":
        name = "image_embeds"
    with torch.no_grad():
        close(getattr(twin(**inputs), name), getattr(model(**inputs), name), atol=1e-4)


def test_rows_gather_captions_by_image_and_name_the_line_that_is_wrong(photos, tmp_path):
    (tmp_path / "captions.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{i % 2}.png", "caption": f"caption {i}"}) for i in range(4))
    )
    rows = load_rows(TASKS["retrieval"], tmp_path / "captions.jsonl", image_dir=photos)
    assert [row["captions"] for row in rows] == [["caption 0", "caption 2"], ["caption 1", "caption 3"]]
    assert [Path(row["image"]).name for row in rows] == ["0.png", "1.png"]
    pairs = load_rows(TASKS["nlvr2"], photos, ["one seven"])
    assert [Path(row["right_image"]).name for row in pairs] == ["1.png", "3.png", "5.png"]
    assert len(load_rows(TASKS["vqa"], photos, ["a?", "b?"], samples=4)) == 4
    for content, message in (
        ('{"image": "0.png", "question": "a?"}\n{"picture": "1.png"}', "rows.jsonl, row 2: no image"),
        ('{"image": "9.png", "question": "a?"}', "row 1: image: no file .*9.png"),
        ('{"image": "0.png"}', "rows.jsonl has no question"),
        ('{"image": "0.png", "question"', "rows.jsonl, line 1: not JSON"),
    ):
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_rows(TASKS["vqa"], tmp_path / "rows.jsonl", image_dir=photos)


def test_bad_input_is_one_line_and_leaves_nothing(dense, pruned, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("kept")
    (tmp_path / "empty").mkdir()
    before, out = sorted(tmp_path.rglob("*")), tmp_path / "out"
    vqa, asked = dense / "vqa", ("--question", QUESTION)
    for arguments, message in (
        (("prune", vqa, tmp_path / "full", "--data", photos, *asked), "full is not empty"),
        (
            ("prune", vqa, out, "--data", tmp_path / "nowhere", *asked),
            "There is no .*nowhere: expected a folder of images",
        ),
        (("prune", vqa, out, "--data", tmp_path / "empty", *asked), "empty holds no image"),
        (("prune", vqa, out, "--data", photos), "photos has no question: .* reads a text with each image"),
        (("prune", vqa, out, "--data", photos, *asked, "--reductions", "1.5"), "expected numbers between 0 and 1"),
        (
            ("prune", vqa, out, "--data", photos, *asked, "--task", "nlvr2"),
            "vqa is not a checkpoint for 'nlvr2', and nothing is trained here",
        ),
        (("prune", vqa, out, "--data", photos, *asked, "--task", "gqa"), "--task gqa: expected one of 'vqa'"),
        (
            ("prune", photos, out, "--data", photos, *asked),
            "photos can't be loaded .*: expected a folder with a config.json",
        ),
        (("evaluate", pruned[0], "--data", photos, "--out", tmp_path), "photos has no question"),
        (("benchmark", pruned[0], "--reductions", "0.9", "--out", out), "--reductions 0.9"),
    ):
        result = invoke(*arguments)
        assert (result.exit_code, result.stdout) == (1, ""), (arguments, result.output)
        assert re.search(f"^madtp-hf: .*{message}.*\n$", result.stderr, re.MULTILINE), result.stderr
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["prune", "evaluate", "benchmark"])
def test_help_fits_a_screen(command):
    shown = invoke(command, "--help").stdout
    assert "Example: madtp-hf" in shown and len(shown.splitlines()) <= 40


@pytest.mark.parametrize(
    "method, note",
    [
        ("tome", "without labels. Tokens are chosen by the method `tome`.\n"),
        ("madtp_merge", "the method `madtp_merge`. The alignment tokens are fitted to the same samples."),
    ],
)
def test_other_methods_are_pruned_to_and_compared(method, note, dense, photos, tmp_path):
    pytest.importorskip("evaluate", reason="metrics need evaluate: pip install 'madtp_hf[metrics]'")
    data = "--data", photos, "--question", QUESTION, "--reductions", 0.3
    result = invoke("prune", dense / "vqa", tmp_path / "out", *data, "--method", method)
    assert result.exit_code == 0, result.stderr
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert model.config.pruning_method == method and model.is_pruning
    assert note in ModelCard.load(tmp_path / "out" / "README.md").text
    rows = [{"image": f"{index}.png", "question": QUESTION, "answers": "seven"} for index in range(4)]
    data = "--data", write_csv(tmp_path / "questions.csv", rows), "--image-dir", photos, "--reductions", 0.3
    compared = invoke("evaluate", dense / "vqa", *data, "--methods", "madtp", method, "--out", tmp_path)
    assert compared.exit_code == 0, compared.stderr
    content = json.loads((tmp_path / "results.json").read_text())
    found = [(row["method"], row["reduction asked"]) for row in content["results"]]
    assert found == [("off", 0), ("madtp", 0.3), (method, 0.3)]
    refused = invoke("evaluate", tmp_path / "nowhere", *data, "--methods", "magic", "--out", tmp_path, "--force")
    assert refused.exit_code == 1 and "--methods magic: expected one of class_attention, evit" in refused.stderr


def test_a_precision_is_that_of_the_figures(pruned, photos, tmp_path):
    pytest.importorskip("evaluate", reason="metrics need evaluate: pip install 'madtp_hf[metrics]'")
    rows = [{"image": f"{index}.png", "question": QUESTION, "answers": "seven"} for index in range(2)]
    data = "--data", write_csv(tmp_path / "questions.csv", rows), "--image-dir", photos, "--reductions", 0
    result = invoke("evaluate", pruned[0], *data, "--out", tmp_path, "--precision", "bfloat16")
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert row["precision"] == "bfloat16"
    assert invoke("evaluate", pruned[0], *data, "--precision", "int3").exit_code == 2
