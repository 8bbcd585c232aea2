"""Photographs of garments: both layouts of the data set, small dense models trained on them, studies of methods."""

import importlib
import io
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import BlipForQuestionAnswering, CLIPModel


ROOT = Path(__file__).parents[1]
for folder in ("benchmarks", "examples"):  # where scripts find each other, as when Python runs them by their paths
    sys.path.insert(0, str(ROOT / folder))

import digit_tasks  # noqa: E402
import selection  # noqa: E402
import selection_finetuned  # noqa: E402


datasets = pytest.importorskip("datasets", reason="the data set's readers need datasets")
pytest.importorskip("sklearn", reason="the studies' digit scenes need scikit-learn")
pytest.importorskip("evaluate", reason="the metrics need evaluate")
garments = importlib.import_module("garments")  # imports datasets


GARMENTS, load_garments = garments.GARMENTS, garments.load_garments
PHOTOGRAPHS = ROOT.parent / "shared" / "photographs"
LABELS = {"train": list(GARMENTS), "validation": list(GARMENTS)[:5], "test": list(GARMENTS)[5:]}


def draw(index: int) -> Image.Image:
    """An image of a brightness and a size of its own."""
    noise = np.random.default_rng(index).integers(0, 60, (40 + index, 30, 3))
    return Image.fromarray((noise + 18 * (index % 10)).astype(np.uint8))


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder: Path, split: str, **columns) -> None:
    datasets.Dataset.from_dict(columns).to_parquet(str(folder / f"{split}.parquet"))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Twenty images of three splits, as parquet files."""
    folder = tmp_path_factory.mktemp("parquet")
    for start, (split, labels) in zip((0, 10, 15), LABELS.items()):
        images = [{"bytes": encoded(draw(start + i)), "path": ""} for i in range(len(labels))]
        write_parquet(folder, split, image=images, label=labels)
    return folder


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The same images in a folder for each class."""
    folder = tmp_path_factory.mktemp("repository")
    for start, (split, labels) in zip((0, 10, 15), LABELS.items()):
        for index, label in enumerate(labels):
            path = folder / split / label / f"{start + index}.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(encoded(draw(start + index)))
    return folder


@pytest.fixture
def digits():
    """Give the studies' tasks their digit scenes back after a test with photographs."""
    tables = (digit_tasks.LOADERS, digit_tasks.PREDICTORS, digit_tasks.SCORES)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)


# Data


def test_both_layouts_give_the_same_rows(parquet, repository):
    for start, (split, labels) in zip((0, 10, 15), LABELS.items()):
        rows, same = (load_garments(folder, split) for folder in (parquet, repository))
        assert list(rows["label"]) == [GARMENTS[label] for label in labels] and rows.column_names == same.column_names
        found = {row["label"]: np.asarray(row["image"]) for row in same}
        for index, row in enumerate(rows):
            assert np.array_equal(row["image"], draw(start + index))
            assert np.array_equal(row["image"], found[row["label"]])


def test_questions_ask_what_the_photograph_shows(parquet):
    labels = list(load_garments(parquet, "test")["label"])
    rows = garments.load_garment_questions(parquet, "test")
    assert len(rows) == 10 and rows["kind"] == ["what", "is it"] * 5
    for index, row in enumerate(rows):
        if row["kind"] == "what":
            assert row["answer"] == labels[index // 2]
        else:
            assert row["answer"] == ("yes" if labels[index // 2] in row["question"].rstrip("?").split() else "no")
    drawn = garments.load_garment_questions(parquet, "train", 25, seed=1)  # more than there are photographs
    assert len(drawn) == 25
    for seed in (1, 2):
        again = garments.load_garment_questions(parquet, "train", 25, seed)
        assert (drawn["question"] == again["question"]) == (seed == 1)


def test_photographs_of_a_garment_share_captions_and_image_id(parquet):
    rows = garments.load_garment_captions(parquet, "train", 20)
    assert sorted(rows["label"]) == sorted(2 * list(GARMENTS.values()))  # two epochs
    for row in rows:
        assert row["captions"] == [caption.format(row["label"]) for caption in garments.CAPTIONS]
        assert row["image_id"] == row["label"]


def test_mistakes_in_the_data_are_named(parquet, tmp_path):
    image = [{"bytes": encoded(draw(0)), "path": ""}]
    write_parquet(tmp_path, "train", image=image, text=["hat"])
    write_parquet(tmp_path, "validation", label=["hat"])
    write_parquet(tmp_path, "test", image=image, label=["gloves"])
    for folder, split, error, message in (
        (tmp_path, "train", ValueError, "the train split has no label: expected both"),
        (tmp_path, "validation", ValueError, "the validation split has no image: expected both"),
        (tmp_path, "test", ValueError, r"unknown labels \['gloves'\]: expected dress, hat"),
        (tmp_path / "none", "test", FileNotFoundError, "has neither test.parquet nor a folder test"),
        (parquet, "dev", ValueError, "split='dev': expected one of train, validation, test"),
    ):
        with pytest.raises(error, match=message):
            load_garments(folder, split)


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f"the clothing data set is not in {PHOTOGRAPHS}")
def test_the_data_set_itself():
    sizes = {split: len(load_garments(PHOTOGRAPHS, split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 3068, "validation": 341, "test": 372}
    rows = load_garments(PHOTOGRAPHS, "validation")
    assert set(rows["label"]) == set(GARMENTS.values()) and max(rows[0]["image"].size) <= 144


# Models and studies


def train(photographs: Path, output: Path) -> None:
    """Run the training script for a step of each stage, in this process."""
    settings = {"label_steps": 1, "question_steps": 1, "caption_steps": 1, "batch_size": 4, "threads": 1}
    settings |= {"photographs": photographs, "output_dir": output}
    before = sys.argv
    sys.argv = ["train_dense_garments.py", *(text for name in settings for text in (f"--{name}", str(settings[name])))]
    try:
        runpy.run_path(str(ROOT / "examples" / sys.argv[0]), run_name="__main__")
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def models(parquet, tmp_path_factory):
    """The folder of small dense models that the script has trained."""
    output = tmp_path_factory.mktemp("garments")
    train(parquet, output)
    return output


def test_the_script_trains_both_models(models):
    blip, clip = models / "blip-vqa-garments", models / "clip-garments"
    assert BlipForQuestionAnswering.from_pretrained(blip).config.vision_config.image_size == 96
    assert CLIPModel.from_pretrained(clip).config.vision_config.image_size == 96
    log = [json.loads(line) for line in (blip / "train.log").read_text().splitlines()]
    assert {record["stage"] for record in log[1:]} == {"label", "question", "caption"}
    assert all(0 <= record["validation"] <= 1 for record in log if "validation" in record)


def test_the_training_script_names_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has neither train\.parquet nor a folder train"):
        train(tmp_path / "none", tmp_path / "output")


def run(study, parquet, model, output, *options) -> dict:
    """Run a study on photographs; its file."""
    study.main(
        ["--photographs", str(parquet), "--model", str(model), "--output", str(output), "--seeds", "0", *options]
    )
    return json.loads(output.read_text())


@pytest.fixture
def small(monkeypatch):
    """Batches of more images than there are photographs, and little else to do."""
    for module in (digit_tasks, selection_finetuned):
        monkeypatch.setattr(module, "BATCH_SIZE", 12)
    monkeypatch.setattr(selection, "INIT_SAMPLES", 24)
    monkeypatch.setattr(selection_finetuned, "REDUCTIONS", [0.0, 0.5])


BOTH_TASKS = pytest.mark.parametrize("task, name", [("vqa", "blip-vqa-garments"), ("clip", "clip-garments")])


@BOTH_TASKS
def test_studies_of_dense_models(task, name, parquet, models, tmp_path, digits, small):
    model, options = models / name, ["--tasks", task, "--methods", "dense"]
    free = run(selection, parquet, model, tmp_path / "free.json", *options)
    tuned = run(selection_finetuned, parquet, model, tmp_path / "tuned.json", *options, "dense_finetuned", "--steps=2")
    for content in (free, tuned):
        samples = 10 if task == "vqa" else 5  # all that there are
        assert content["settings"]["validation_samples"] == content["settings"]["test_samples"] == samples
        assert content["metric"] == "accuracy"
    dense, finetuned = tuned["rows"]
    assert dense["points"] == free["rows"][0]["points"] and 0 <= dense["points"][0]["score"] <= 1
    assert finetuned["points"][0]["reached"] == 0 and finetuned["training_seconds"] > dense["training_seconds"]


def test_a_study_of_validation_photographs_halves_them(parquet, models, tmp_path, digits, small):
    options = ["--tasks", "clip", "--methods", "dense", "--split", "validation"]
    settings = run(selection_finetuned, parquet, models / "clip-garments", tmp_path / "s.json", *options)["settings"]
    assert settings["validation_samples"] == 2 and settings["test_samples"] == 3


@pytest.mark.slow
@BOTH_TASKS
def test_studies_of_methods(task, name, parquet, models, tmp_path, digits, small):
    methods = ["madtp_data", "madtp_merge", "class_attention", "tome", "evit", "random"]
    options = ["--tasks", task, "--methods", *methods]
    free = run(selection, parquet, models / name, tmp_path / "free.json", *options, "--reductions", "0.5")
    tuned = run(selection_finetuned, parquet, models / name, tmp_path / "tuned.json", *options, "--steps", "2")
    for content in (free, tuned):
        assert [row["method"] for row in content["rows"]] == methods
        for row in content["rows"]:
            *_, pruned = row["points"]
            assert pruned["asked"] == 0.5 and 0.35 < pruned["reached"] < 0.65 and 0 <= pruned["score"] <= 1


@pytest.mark.parametrize("study", [selection, selection_finetuned])
def test_studies_name_mistakes(study, parquet, models, tmp_path, digits, capsys):
    blip = models / "blip-vqa-garments"
    for photographs, task, message in (
        (tmp_path / "none", "vqa", "has neither validation.parquet nor a folder validation"),
        (parquet, "nlvr2", "Photographs have no task nlvr2: expected vqa or clip"),
    ):
        with pytest.raises(SystemExit):
            run(study, photographs, blip, tmp_path / "study.json", "--tasks", task)
        assert message in capsys.readouterr().err
