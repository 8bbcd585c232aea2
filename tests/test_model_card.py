import ast
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image
from transformers import BlipConfig

from madtp_hf import MadtpBlipConfig, MadtpBlipForQuestionAnswering
from madtp_hf.budgets.evaluation import report
from madtp_hf.checkpoints.card import create_model_card, draw_budgets, write_model_card

from .conftest import TASKS, make_task_blip, make_task_model


REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "demo_digit_vqa.json"
SCHEDULE = [[0.3, 0.5], [0.5, 1.0], [0.8, 2.0]]


def pruned_config(task="vqa", **settings):
    auto_map = {"AutoModel": f"modeling_madtp_blip.{TASKS[task].model_class.__name__}"}
    return MadtpBlipConfig(auto_map=auto_map, **settings)


def code_blocks(card):
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


def test_committed_cards_are_current_and_a_stale_one_is_named(monkeypatch, tmp_path):
    generate = runpy.run_path(str(REPOSITORY / "model_cards" / "generate.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    generate()  # nothing is stale
    for checkpoint in generate.__globals__["CHECKPOINTS"]:
        (tmp_path / checkpoint).mkdir()
        for file in (REPOSITORY / "examples" / checkpoint).iterdir():
            if file.name in ("config.json", "README.md", "train.log"):
                (tmp_path / checkpoint / file.name).write_text(file.read_text())
    monkeypatch.setitem(generate.__globals__, "EXAMPLES", tmp_path)
    log = tmp_path / "blip-vqa-digits" / "train.log"
    log.write_text(log.read_text().replace('"accuracy": 0.9341', '"accuracy": 0.5'))
    with pytest.raises(SystemExit, match=r"^Not current: examples/blip-vqa-digits/README\.md\. Run `make cards`"):
        generate()
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    generate()
    assert "| 50.0% |" in (tmp_path / "blip-vqa-digits" / "README.md").read_text()


def test_a_card_shows_every_budget_to_people_and_to_the_hub(tmp_path):
    results = json.loads(RESULTS.read_text())
    results |= {
        "dataset": {"name": "digit scenes", "split": "test", "example": 'is there a "seven"?'},
        "settings": {"seed": 1, "target reduction": [0.5, 0.8]},
        "versions": {"torch": "2.13.0"},
    }
    config = pruned_config(pruning_schedule=SCHEDULE, pruning_temperature=2.0)
    card = create_model_card(
        config,
        "someone/blip-vqa-madtp",
        metrics=results,
        base_model="Salesforce/blip-vqa-base",
        license="bsd-3-clause",
        datasets=["someone/digits", str(tmp_path)],
    )
    card.save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")

    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "visual-question-answering"
    assert card.data.tags == ["blip", "madtp", "token-pruning"] and card.data.license == "bsd-3-clause"
    assert card.data.base_model == "Salesforce/blip-vqa-base" and card.data.datasets == ["someone/digits"]
    measured = {(result.metric_args["reduction"], result.metric_value) for result in card.data.eval_results}
    assert measured == {(row["reduction asked"], row["accuracy %"]) for row in results["results"]}
    assert len({result.metric_name for result in card.data.eval_results}) == len(results["results"])
    assert {(result.metric_type, result.dataset_name) for result in card.data.eval_results} == {
        ("accuracy", "digit scenes")
    }
    index = eval_results_to_model_index(card.data.model_name, card.data.eval_results)
    assert model_index_to_eval_results(index) == ("blip-vqa-madtp", card.data.eval_results)

    for row in results["results"]:
        shown = (
            f"| {row['reduction asked']:g} | {row['reached']:.1%} | {row['accuracy %']:.1%} | {row['GFLOPs']:.4g} |"
        )
        assert shown in card.text
    dense, pruned = results["before_fine_tuning"]
    before = f"{dense['accuracy %']:.1%}, pruning off; accuracy {pruned['accuracy %']:.1%} at 0.8 reduction"
    assert before in card.text
    baseline = f"baseline, from the words of the questions: accuracy {results['baseline']['accuracy %']:.1%}"
    assert baseline in card.text
    assert "| target reduction | 0.5, 0.8 |" in card.text and "torch 2.13.0" in card.text
    assert "calibrated at\n0.3, 0.5, 0.8" in card.text and "As it loads, it prunes at reduction 0.8." in card.text
    assert "2403.02991" in card.text and "2201.12086" in card.text and "budgets.png" not in card.text
    (usage,) = code_blocks(card)
    ast.parse(usage)
    assert 'revision="...", trust_remote_code=True' in usage and "set_pruning(reduction=0.5)" in usage
    assert str(tmp_path) not in card.content


def test_a_card_says_how_the_checkpoint_was_made_and_which_method_prunes():
    dataset = {"name": "digit scenes", "split": "test"}
    results = {"title": "48 samples of digit scenes", "dataset": dataset, "versions": {"torch": "2.13.0"}}
    results["results"] = [{"reduction asked": 0.5, "accuracy %": 0.9, "GFLOPs": 1.0, "times faster": 2.0}]
    pruned = create_model_card(pruned_config(pruning_schedule=SCHEDULE), "m", metrics=results, base_model="org/blip")
    assert "Made from `org/blip`." in pruned.text and "rained" not in pruned.text.replace("released, was trained", "")
    assert "On 48 samples of digit scenes, test split." in pruned.text and "| 90.0% | 1 | 2 |" in pruned.text
    settings = {"from": "blip", "steps": 150, "training data": "digit scenes"}
    trained = create_model_card(pruned_config(), "m", metrics={**results, "settings": settings})
    assert (
        "Fine-tuned from `blip` on digit scenes, 150 steps." in trained.text and "How it was trained" in trained.text
    )
    only_evaluated = create_model_card(pruned_config(), "m", metrics={**results, "settings": {**settings, "steps": 0}})
    assert "Fine-tuned" not in only_evaluated.text and "How it was made" in only_evaluated.text
    evit = create_model_card(pruned_config(pruning_method="evit"), "m")
    assert "by [EViT]" in evit.text and evit.data.tags == ["blip", "evit", "token-pruning"]


def test_without_metrics_nothing_is_claimed():
    for config in (pruned_config(), BlipConfig(architectures=["BlipForImageTextRetrieval"])):
        card = create_model_card(config, "model")
        assert "model-index" not in card.data.to_dict() and "None are recorded" in card.text
        assert "%" not in card.text and "GFLOPs" not in card.text and "|---" not in card.text
        assert "license" in card.text


@pytest.mark.parametrize("task", TASKS)
def test_a_card_of_every_task_is_python_and_valid(task):
    for name, pinned in (("someone/model", True), ("model", False)):
        card = create_model_card(pruned_config(task), name, metrics={"accuracy": 0.93})
        (usage,) = code_blocks(card)
        ast.parse(usage)
        assert ('revision="..."' in usage) == pinned and usage.count("trust_remote_code=True") == usage.count(
            "from_pretrained("
        ) + usage.count("pipeline(")
        (result,) = ModelCard(card.content).data.eval_results
        assert (result.metric_type, result.metric_name, result.metric_value) == ("accuracy", "accuracy", 0.93)
    dense = create_model_card(
        TASKS[task].blip_class.config_class(architectures=[TASKS[task].blip_class.__name__]), "m"
    )
    usage, pruning = code_blocks(dense)
    ast.parse(usage), ast.parse(pruning)
    assert "trust_remote_code" not in dense.text and "## Budgets" not in dense.text and "madtp" not in dense.data.tags


def test_metrics_of_another_form_are_named(tmp_path):
    config = pruned_config()
    (tmp_path / "broken.json").write_text("{")
    row = {"reduction asked": 0.5, "accuracy %": 0.9}
    for bad in (
        0.93,
        {"results": []},
        {"0.5": 0.9, "accuracy": None},
        {"0.5": 0.9, "accuracy": 0.8},
        {"0.5": 93.0},  # percent, or GFLOPs?
        {0.5: {"reduction": 0.4, "accuracy": 0.9}},
        {"reduction": 0.4, "reduction asked": 0.5, "accuracy": 0.9},
        {"accuracy": np.array([0.5, 0.6])},
        {"tasks": {"vqa": {}}},
        {"accuracy": "0.93"},
        {"accuracy": float("nan")},
        {"reduction asked": 0.5},
        [{"accuracy": 0.9}, {"accuracy": 0.8}],
        [row, row],
        tmp_path / "broken.json",
        str(tmp_path / "nowhere.json"),
    ):
        with pytest.raises(ValueError, match="metrics=") as error:
            create_model_card(config, "model", metrics=bad)
        assert (bad.name if isinstance(bad, Path) else repr(bad)) in str(error.value)
    with pytest.raises(ValueError, match=r"architectures=.'BertModel'.: expected one of BlipForQuestionAnswering"):
        create_model_card(BlipConfig(architectures=["BertModel"]), "model")


def test_metrics_in_every_form_that_people_have():
    config, rows = (
        pruned_config(),
        [{"reduction asked": 0.0, "accuracy": 0.5}, {"reduction asked": 0.5, "accuracy": 0.25}],
    )
    expected = create_model_card(config, "model", metrics=rows).content
    for metrics in (
        [{"reduction": 0, "accuracy": np.float64(0.5)}, {"reduction": 0.5, "accuracy": torch.tensor(0.25)}],
        {0.0: {"accuracy": np.float32(0.5)}, 0.5: {"accuracy": 0.25}},
        {"0": {"accuracy": 0.5}, "0.5": {"accuracy": np.array(0.25)}},
        [{"reduction": 0.0, "accuracy": np.array([0.5])}, {"reduction": 0.5, "accuracy": torch.tensor([0.25])}],
        {"results": rows},
    ):
        assert create_model_card(config, "model", metrics=metrics).content.replace(": 0\n", ": 0.0\n") == expected
    card = create_model_card(config, "model", metrics={"accuracy": np.int64(1), "dataset": "digits"})
    (result,) = ModelCard(card.content).data.eval_results
    assert (result.metric_value, result.dataset_name) == (1, "digits")
    card = create_model_card(config, "model", metrics={0.5: {"accuracy": 0.25}, "dataset": "digits"})
    (result,) = ModelCard(card.content).data.eval_results
    assert (result.metric_args, result.dataset_name) == ({"reduction": 0.5}, "digits")
    for nothing in (None, {}, []):
        assert "None are recorded" in create_model_card(config, "model", metrics=nothing).text


def test_the_picture_of_budgets(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import matplotlib

    backend = matplotlib.rcParams._get("backend")
    assert draw_budgets(RESULTS, tmp_path / "budgets.png")
    assert matplotlib.rcParams._get("backend") == backend
    with Image.open(tmp_path / "budgets.png") as picture:
        assert picture.format == "PNG" and 400 < picture.width < 1200 and 200 < picture.height < 1000
        assert len(picture.convert("RGB").getcolors(2**20)) > 10  # not blank
    assert (tmp_path / "budgets.png").stat().st_size < 100_000

    rows = json.loads(RESULTS.read_text())["results"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for metrics in (None, {"accuracy": 0.9}, rows[:1], rows):  # the last for want of matplotlib
        assert not draw_budgets(metrics, tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()


def run_lines(code, folder, monkeypatch):
    for name in ("image", "left", "right"):
        Image.effect_noise((60, 40), 90).convert("RGB").save(folder / f"{name}.jpg")
    monkeypatch.chdir(folder)
    namespace = {}
    exec(code, namespace)
    return namespace


@pytest.mark.parametrize("task", TASKS)
def test_the_lines_of_a_written_card_run(task, processor, tmp_path, monkeypatch, capsys):
    folder = tmp_path / f"card-of-{task}"  # in one process, transformers takes folders of one name for one class
    model = make_task_model(task, text_config={"num_hidden_layers": 2})
    model.config.pruning_schedule = SCHEDULE
    model.set_pruning(reduction=0.8)
    rows = [
        {"reduction asked": asked, "reached": asked, "accuracy %": 0.9 - asked / 10, "GFLOPs": 1 - asked}
        for asked in (0.0, 0.5, 0.8)
    ]
    report("7 questions", rows, folder, settings={"seed": 3, "schedule": "cosine"}, dataset="digit scenes")
    capsys.readouterr()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_model_card(folder, base_model=str(folder))

    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model is None and f"Made from `{folder.name}`" in card.text
    assert "| seed | 3 |" in card.text and "madtp_hf 0" in card.text and "transformers 5" in card.text
    assert ("![accuracy against GFLOPs](budgets.png)" in card.text) == (folder / "budgets.png").exists()
    (usage,) = code_blocks(card)
    names = run_lines(usage, tmp_path, monkeypatch)
    (called,) = {"ask", "caption", "judge", "match"} & names.keys()
    loaded = names[called].model
    assert type(loaded).__name__ == TASKS[task].model_class.__name__
    assert loaded.config.pruning_temperature == 1.0  # what the last line set
    printed = capsys.readouterr()
    assert printed.out.strip() and "Do you wish to run" not in printed.out + printed.err


@pytest.mark.parametrize("task", TASKS)
def test_the_lines_of_the_shipped_cards_run(task, tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples", target_is_directory=True)
    usage, pruning = code_blocks(ModelCard.load(REPOSITORY / "examples" / f"blip-{task}-digits" / "README.md"))
    run_lines(usage, tmp_path, monkeypatch)
    assert capsys.readouterr().out.strip()
    model = run_lines(pruning, tmp_path, monkeypatch)["model"]
    assert type(model) is TASKS[task].model_class


def test_a_dense_model_that_was_just_made_ready_for_pruning():
    """Its architectures are still the dense one's, its auto_map is not."""
    model = MadtpBlipForQuestionAnswering.from_blip(make_task_blip("vqa"), num_alignment_tokens=12)
    card = create_model_card(model.config, "model")
    assert "trust_remote_code=True" in code_blocks(card)[0] and "No budgets were calibrated" in card.text
    assert "As it loads, pruning is off." in card.text
