"""The paper's recipes: their options exist, their commands and figures are those of the page, and each one trains,
saves, resumes and evaluates on a small imitation of the published files."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from madtp_hf import MadtpBlipConfig, MadtpClipConfig, count_flops

from .test_examples import make_dense


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "examples" / "recipes"
PAGE = (ROOT / "docs" / "reproduce.md").read_text()
# For each recipe: the script that reads it, and the task of the tiny model that stands in for the published one.
SCRIPTS = {
    "nlvr2": ("run_nlvr2.py", "nlvr2"),
    "vqav2": ("run_vqa.py", "vqa"),
    "coco_captions": ("run_captioning.py", "captioning"),
    "coco_retrieval": ("run_retrieval.py", "retrieval"),
    "flickr30k_retrieval": ("run_retrieval.py", "retrieval"),
    "coco_clip": ("run_clip_retrieval.py", "clip_retrieval"),
    "flickr30k_clip": ("run_clip_retrieval.py", "clip_retrieval"),
}
STEPS, SAVED = 20, 10
# What makes a run small; all else, paths included, is the recipe's.
SMALL = {
    "max_steps": STEPS,
    "save_steps": SAVED,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "validation_samples": 8,
    "queue_size": 8,
    "dataloader_num_workers": 0,
    "use_cpu": True,
    "disable_tqdm": True,
}


# The published files, in small


def save(image, *paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def write_nlvr2(folder: Path) -> None:
    """The authors' JSON lines; train's images below images/train/<directory>/."""
    from madtp_hf.data import load_digit_statements

    for split, name, count in (("train", "train", 24), ("validation", "dev", 8), ("test", "test1", 7)):
        lines = []
        for index, row in enumerate(load_digit_statements(split, count)):
            pair = f"{name}-{index}-0"
            place = folder / "images" / name / ("17" if name == "train" else "")
            save(row["left_image"], place / f"{pair}-img0.png")
            save(row["right_image"], place / f"{pair}-img1.png")
            entry = {"identifier": f"{pair}-0", "sentence": f"{row['sentence'].capitalize()}."}
            entry |= {"label": str(bool(row["label"])), "synset": "digit"}
            lines.append(json.dumps(entry | ({"directory": 17} if name == "train" else {})))
        (folder / f"{name}.json").write_text("\n".join(lines) + "\n")


def write_vqav2(folder: Path, images: Path) -> None:
    """The authors' questions and annotations, and BLIP's list of answers."""
    from madtp_hf.data import load_digit_questions

    folder.mkdir(parents=True)
    seen = set()
    for split, subset, count in (("train", "train2014", 24), ("validation", "val2014", 9)):
        questions, annotations = [], []
        for index, row in enumerate(load_digit_questions(split, count), 1000):
            save(row["image"], images / subset / f"COCO_{subset}_{index:012d}.jpg")
            asked = {"question_id": index * 10, "image_id": index}
            questions.append({**asked, "question": row["question"].capitalize()})
            annotations.append({**asked, "answers": [{"answer": row["answer"], "answer_id": n} for n in range(1, 11)]})
            seen.add(row["answer"])
        document = {"data_subtype": subset, "task_type": "Open-Ended"}
        files = {"v2_OpenEnded_mscoco_{}_questions": {"questions": questions}}
        files["v2_mscoco_{}_annotations"] = {"annotations": annotations}
        for name, part in files.items():
            (folder / f"{name.format(subset)}.json").write_text(json.dumps(document | part))
    (folder / "answer_list.json").write_text(json.dumps(sorted(seen)))


def write_karpathy(file: Path, coco: bool) -> None:
    """Karpathy's JSON and its images."""
    from madtp_hf.data import load_digit_captions

    images = []
    splits = (("train", "train", 16), ("train", "restval", 8), ("validation", "val", 8), ("test", "test", 6))
    for split, name, count in splits:
        for index, row in enumerate(load_digit_captions(split, count), 5000 + 100 * len(images)):
            entry = {"split": name, "filename": f"{index}.jpg"}
            folder = file.parent / "flickr30k-images"
            if coco:
                subset = "train2014" if name == "train" else "val2014"
                entry |= {"filepath": subset, "filename": f"COCO_{subset}_{index:012d}.jpg", "cocoid": index}
                folder = file.parent / subset
            elif name == "restval":
                entry["split"] = "train"
            save(row["image"], folder / entry["filename"])
            entry["sentences"] = [{"raw": f"{text.capitalize()}."} for text in row["captions"]]
            images.append(entry)
    file.write_text(json.dumps({"images": images, "dataset": file.stem.removeprefix("dataset_")}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as docs/reproduce.md describes it: data/, models/ and the repository's examples/."""
    pytest.importorskip("sklearn", reason="digit scenes need scikit-learn: pip install 'madtp_hf[digits]'")
    folder = tmp_path_factory.mktemp("recipes")
    for name in ("coco", "flickr30k"):
        (folder / "data" / name).mkdir(parents=True)
        write_karpathy(folder / "data" / name / f"dataset_{name}.json", coco=name == "coco")
    write_nlvr2(folder / "data" / "nlvr2")
    write_vqav2(folder / "data" / "vqav2", folder / "data" / "coco")
    for recipe, (_, task) in SCRIPTS.items():
        model = folder / yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())["model"]
        make_dense(task, model)
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


# Runs


def arguments(recipe: str, **others) -> list[str]:
    known = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    small = {name: value for name, value in (SMALL | others).items() if name != "queue_size" or name in known}
    options = [text for name, value in small.items() for text in (f"--{name}", str(value))]
    return [f"examples/{SCRIPTS[recipe][0]}", f"examples/recipes/{recipe}.yaml", *options]


def run_here(recipe: str, **others) -> None:
    """Run a recipe in this process."""
    before, sys.argv = sys.argv, arguments(recipe, **others)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = before


def run_in_two_processes(recipe: str, **others) -> None:
    """Run a recipe under accelerate in two processes on the CPU."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launch, "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += arguments(recipe, **others)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]


def check_run(recipe: str, output: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Check what a run has written; return the weights of its last training checkpoint, and its results."""
    wanted = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    results = json.loads((output / "results.json").read_text())
    assert results["settings"]["steps"] == STEPS
    assert results["settings"]["target reduction"] == wanted["target_reduction"]
    assert results["settings"]["learning rate"] == wanted["learning_rate"]
    asked = [row["reduction asked"] for row in results["results"]]
    # On so small a model, 100 alignment tokens cost too much for the largest reductions.
    assert len(asked) > 1 and asked == [0, *wanted["reductions"]][: len(asked)]
    assert results["results"][-1]["GFLOPs"] < results["results"][0]["GFLOPs"]
    assert json.loads((output / "config.json").read_text())["num_alignment_tokens"] == 100
    state = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert state["global_step"] == STEPS
    return load_file(output / f"checkpoint-{STEPS}" / "model.safetensors"), results["results"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SCRIPTS)
def test_a_recipe_trains_saves_resumes_and_evaluates(recipe, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("madtp_hf.budgets.alignment.FIT_STEPS", 2)  # that it runs is shown, not what it reaches
    run = run_in_two_processes if recipe == "nlvr2" else run_here
    output = folder / yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())["output_dir"]
    run(recipe)
    whole, _ = check_run(recipe, output)

    # What is left by a stop before the last step; a run that starts over would save it anew.
    shutil.rmtree(output / f"checkpoint-{STEPS}")
    (output / "results.json").unlink()
    state = output / f"checkpoint-{SAVED}" / "trainer_state.json"
    saved = state.stat().st_mtime_ns
    run(recipe, resume_from_checkpoint="last")
    assert state.stat().st_mtime_ns == saved
    resumed, results = check_run(recipe, output)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-6)

    run_here(recipe, do_train=False, model=output, output_dir=folder / f"evaluated-{recipe}")
    again = json.loads((folder / f"evaluated-{recipe}" / "results.json").read_text())["results"]
    for row, before in zip(again, results, strict=True):
        timed = ("seconds", "time", "ms")
        for name, value in before.items():
            if not any(word in name for word in timed):
                assert row[name] == pytest.approx(value, abs=1e-4), name


# Options, commands and figures


def parse(recipe: str, *options: str, monkeypatch) -> dict:
    """Return all values that the recipe's script gets from it and further options."""
    script = ROOT / "examples" / SCRIPTS[recipe][0]
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", [script.name, str(RECIPES / f"{recipe}.yaml"), *options])
    parts = runpy.run_path(str(script), run_name="parsed")["parse_arguments"]()
    return {name: value for part in parts for name, value in vars(part).items()}


@pytest.mark.parametrize("recipe", SCRIPTS)
def test_a_script_takes_all_options_of_a_recipe(recipe, monkeypatch):
    got = parse(recipe, "--target_reduction", "0.5", "--per_device_train_batch_size", "3", monkeypatch=monkeypatch)
    wanted = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    assert got["num_alignment_tokens"] == 100 and wanted["train_samples"] == wanted["test_samples"] == 0
    wanted |= {"target_reduction": [0.5], "per_device_train_batch_size": 3}
    for name, value in wanted.items():
        found = getattr(got[name], "value", got[name])
        assert found == value and type(found) in (type(value), float), name


def test_every_recipe_is_run():
    assert sorted(SCRIPTS) == sorted(path.stem for path in RECIPES.glob("*"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat: 1", "unknown options learning_rat: expected those that --help-all lists"),
        ("learning_rate: fast", "argument --learning_rate"),
        ("- a", "holds list: expected lines of the form"),
        ("a: [", "can't be read"),
        (None, "can't be read"),
    ],
)
def test_a_recipe_that_is_wrong_is_named(text, message, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "mine.yaml"
    if text is not None:
        recipe.write_text(text)
    monkeypatch.setattr(f"{__name__}.RECIPES", tmp_path)
    monkeypatch.setitem(SCRIPTS, "mine", SCRIPTS["nlvr2"])
    with pytest.raises(SystemExit):
        parse("mine", monkeypatch=monkeypatch)
    assert message in capsys.readouterr().err


def test_texts_are_cleaned_as_in_blip(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    datasets = pytest.importorskip("datasets", reason="the scripts use datasets: pip install 'madtp_hf[train]'")
    from script_arguments import clean_texts

    rows = datasets.Dataset.from_dict({"captions": [['A "red" ball.', "two\tBalls"]], "question": ["What's U.S.?"]})
    assert clean_texts(rows)[0] == {"captions": ["a red ball", "two balls"], "question": "what's us?"}


@pytest.mark.parametrize("recipe", SCRIPTS)
def test_the_page_has_a_recipes_command(recipe):
    commands = [shlex.split(line) for line in re.sub(r"\\\n\s*", "", PAGE).splitlines() if "accelerate launch" in line]
    command = next(words for words in commands if f"examples/recipes/{recipe}.yaml" in words)
    at = command.index(f"examples/recipes/{recipe}.yaml")
    assert command[at - 1] == f"examples/{SCRIPTS[recipe][0]}"
    assert command[at + 1 :] == ["--tf32", "True"]  # refused without such a GPU


def test_the_pages_figures_are_count_flops():
    def dense(config, task, text=None, answer=0):
        images = (2,) if task == "nlvr2" else ()
        patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        vision = torch.full((config.vision_config.num_hidden_layers + 1, *images, 1), patches + 1)
        text = None if text is None else torch.full((config.text_config.num_hidden_layers + 1, 1), text)
        return count_flops(config, task, vision, text, answer).item() / 1e9

    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    clip = MadtpClipConfig(
        vision_config={**large, "image_size": 336, "patch_size": 14},
        text_config={"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    )
    figures = {
        "NLVR2": dense(MadtpBlipConfig(), "nlvr2", 36),
        "VQAv2": dense(MadtpBlipConfig(vision_config={"image_size": 480}), "vqa", 14, 4),
        "COCO captions": dense(MadtpBlipConfig(), "captioning", answer=15),
        "retrieval, BLIP": dense(MadtpBlipConfig(), "retrieval", 35),
        "retrieval, CLIP": dense(clip, "clip", 77),
    }
    print(figures)
    for name, value in figures.items():
        assert re.search(rf"^\| {name} .*\| {value:.2f} \|", PAGE, re.MULTILINE), (name, value)
