"""CLIP_benchmark, mteb and lmms-eval themselves, on digit scenes: their numbers are those of `evaluate_task`."""

import json
import sys
from pathlib import Path

import pytest
import torch

from madtp_hf import calibrate
from madtp_hf.budgets.evaluation import evaluate_task
from madtp_hf.checkpoints.load import load


pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[1] / "examples"
REDUCTIONS = [0.0, 0.5]
NUM_SCENES = 24


def needs(package: str, extra: str):
    return pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[{extra}]'")


@pytest.fixture(scope="module")
def digits():
    """The module of digit scenes."""
    for package in ("datasets", "sklearn"):
        pytest.importorskip(package, reason=f"the digit scenes need {package}")
    import madtp_hf.data

    return madtp_hf.data


def pruned(shipped: str, task: str, rows, folder: Path) -> str:
    """Save a shipped dense model, calibrated for 0.5 on some rows."""
    torch.manual_seed(0)
    loaded = load(str(EXAMPLES / shipped), task, device="cpu")
    collator = loaded.task.make_collator(loaded.model, loaded.processor)
    with pytest.warns(UserWarning):  # few samples
        calibrate(loaded.model, [collator(list(rows))], REDUCTIONS[1:])
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(digits, tmp_path_factory):
    rows = digits.load_digit_captions("validation", 16)
    return pruned("clip-digits", "clip", rows, tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def scenes(digits):
    """Images with four captions each; no two images share one."""
    return digits.load_digit_captions("test", NUM_SCENES)


def own_numbers(checkpoint: str, task: str, rows, reductions=REDUCTIONS) -> dict[float, dict]:
    """This package's evaluation of a checkpoint, by reduction."""
    loaded = load(checkpoint, task, device="cpu")
    results = evaluate_task(loaded.model, loaded.processor, list(rows), reductions)
    assert results[1]["reached"] > 0.3  # pruning is on
    return {row["reduction asked"]: row for row in results}


def test_mteb(clip, scenes):
    mteb = needs("mteb", "mteb")
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    from madtp_hf.standard_benchmarks.mteb import register_with_mteb

    class DigitScenes(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="DigitScenesT2IRetrieval",
            description="Digit scenes.",
            reference=None,
            dataset={"path": "none", "revision": "none"},
            type="Any2AnyRetrieval",
            category="t2i",
            modalities=["text", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="recall_at_1",
        )

        def load_data(self, **options):
            texts = {f"{i}-{j}": text for i, row in enumerate(scenes) for j, text in enumerate(row["captions"])}
            images = scenes.select_columns(["image"]).add_column("id", [str(i) for i in range(len(scenes))])
            split = {
                "queries": Dataset.from_dict({"id": list(texts), "text": list(texts.values())}),
                "corpus": images,
                "relevant_docs": {query: {query.partition("-")[0]: 1} for query in texts},
                "top_ranked": None,
            }
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    own = own_numbers(clip, "clip", scenes)
    for reduction in REDUCTIONS:
        meta = register_with_mteb(clip, reduction=reduction)
        model = mteb.get_model(meta.name)
        results = mteb.evaluate(model, [DigitScenes()], cache=None, show_progress_bar=False)
        (scores,) = results.task_results[0].scores["test"]
        assert scores["recall_at_1"] == pytest.approx(own[reduction]["text_to_image@1 %"], abs=1e-5)


def test_clip_benchmark(clip, scenes, tmp_path, monkeypatch):
    needs("clip_benchmark", "clip-benchmark")
    from clip_benchmark import cli

    from madtp_hf.standard_benchmarks.clip_benchmark import run_clip_benchmark

    def build_dataset(transform, **options):
        return [(transform(row["image"]), row["captions"]) for row in scenes]

    monkeypatch.setattr(cli, "build_dataset", build_dataset)
    options = {"--model": clip, "--dataset": "flickr30k", "--num_workers": "0", "--model_type": "madtp_hf"}
    options["--output"] = str(tmp_path / "{pretrained}.json")
    arguments = [text for option in options.items() for text in option]
    arguments += ["--no_amp", "--recall_k", "1", "5", "10", "--pretrained", *map(str, REDUCTIONS)]
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", "eval", *arguments])
    run_clip_benchmark()
    for reduction, own in own_numbers(clip, "clip", scenes).items():
        found = json.loads((tmp_path / f"{reduction}.json").read_text())["metrics"]
        assert found["image_retrieval_recall@1"] == pytest.approx(own["text_to_image@1 %"], abs=1e-5)
        assert found["text_retrieval_recall@1"] == pytest.approx(own["image_to_text@1 %"], abs=1e-5)
        mean = sum(found.values()) / len(found)
        assert len(found) == 6 and mean == pytest.approx(own["mean %"], abs=1e-5)


LMMS_TASK = """
task: digit_questions
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: !function utils.question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 16}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}]
"""
LMMS_UTILS = """
def images(document):
    return [document["image"].convert("RGB")]


def question(document, lmms_eval_specific_kwargs=None):
    return document["question"] + "\\nAnswer the question using a single word or phrase."
"""


def test_lmms_eval(digits, tmp_path):
    """lmms-eval finds the model by its entry point, and reads the rows itself."""
    needs("lmms_eval", "lmms-eval")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    checkpoint = pruned("blip-vqa-digits", "vqa", digits.load_digit_questions("validation", 16), tmp_path / "vqa")
    questions = digits.load_digit_questions("test", 64)
    (tmp_path / "tasks").mkdir()
    questions.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "tasks/digits.yaml").write_text(LMMS_TASK.format(rows=tmp_path / "rows.parquet"))
    (tmp_path / "tasks/utils.py").write_text(LMMS_UTILS)
    for reduction, own in own_numbers(checkpoint, "vqa", questions).items():
        found = simple_evaluate(
            "madtp_hf",
            f"pretrained={checkpoint},reduction={reduction}",
            tasks=["digit_questions"],
            batch_size=8,
            device="cpu",
            bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        )
        assert found["results"]["digit_questions"]["exact_match,none"] == pytest.approx(own["accuracy %"])
