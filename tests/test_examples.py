"""The scripts of the four tasks, from a dense model to a pruned one that is saved, on a few digit scenes and with
random weights."""

import inspect
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    CLIPModel,
)

from madtp_hf import MadtpBlipConfig, ReductionCallback, RetrievalTrainer


EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # where a script finds script_arguments.py, as when Python runs it by its path
DIGITS = EXAMPLES / "blip-vqa-digits"
TASKS = {
    "vqa": (BlipForQuestionAnswering, []),
    "nlvr2": (BlipForQuestionAnswering, []),
    "captioning": (BlipForConditionalGeneration, ["--metrics", "bleu", "--max_new_tokens", "6", "--num_beams", "1"]),
    "retrieval": (BlipForImageTextRetrieval, ["--queue_size", "8", "--k", "4"]),
    "clip_retrieval": (CLIPModel, ["--queue_size", "8"]),
}


def make_dense(task: str, folder: Path) -> None:
    """A small dense model with random weights, for the task's script to prune."""
    shipped = EXAMPLES / "clip-digits" if task == "clip_retrieval" else DIGITS
    config = AutoConfig.from_pretrained(shipped)
    config.image_text_hidden_size = 16
    for branch, layers in ((config.vision_config, 3), (config.text_config, 2)):
        branch.num_hidden_layers, branch.initializer_range = layers, 0.2
    torch.manual_seed(0)
    model = TASKS[task][0](config)
    if task == "clip_retrieval":  # random weights that tell patches from one another
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(0.2 / parameter.std() if "embedding" in name else 2.0 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(shipped).save_pretrained(folder)


def run_example(task: str, folder: Path, output: Path) -> None:
    """Run the task's script on the model in `folder`, in this process."""
    settings = {
        "model": folder,
        "output_dir": output,
        "train_samples": 16,
        "validation_samples": 8,
        "test_samples": 7,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "reductions": 0.6,
        "num_alignment_tokens": 16,
        "alignment_dim": 0,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    before = sys.argv
    sys.argv = [f"run_{task}.py", *arguments, "--target_reduction", "0.6", "0.65", *TASKS[task][1]]
    try:
        runpy.run_path(str(EXAMPLES / sys.argv[0]), run_name="__main__")
    finally:
        sys.argv = before


def check_output(output: Path, steps: int = 4) -> list[dict]:
    results = json.loads((output / "results.json").read_text())
    rows, default = results["results"], results["default_budget"]
    assert [row["reduction asked"] for row in rows] == [0, 0.6]
    assert rows[0]["reached"] == 0 and 0.4 < rows[1]["reached"] < 0.8
    assert rows[1]["GFLOPs"] < 0.6 * rows[0]["GFLOPs"]
    assert AutoProcessor.from_pretrained(output).tokenizer is not None
    model, info = AutoModel.from_pretrained(output, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.calibrated_reductions[0] == 0.6
    # The largest reduction that costs at most a point on validation data, which the card says.
    lossless = default["scores"]["0.6"] >= default["scores"]["0"] - 0.01
    assert default["reduction"] == (0.6 if lossless else 0)
    assert model.config.pruning_temperature == (model.config.pruning_schedule[0]["temperature"] if lossless else 0)
    card = ModelCard.load(output / "README.md")  # what is saved is ready to publish
    assert {result.metric_args["reduction"] for result in card.data.eval_results} == {0, 0.6}
    assert ("Saved at 0.6, the largest" if lossless else "Saved with pruning off") in card.text
    assert "dense" in card.text and f"| steps | {steps} |" in card.text and "set_pruning(reduction=0.6)" in card.text
    assert str(output.parent) not in card.content + (output / "results.json").read_text()
    return rows


@pytest.mark.parametrize("task", TASKS)
def test_a_script_runs_from_start_to_end(task, tmp_path, capsys):
    make_dense(task, tmp_path / "dense")
    output = tmp_path / f"pruned-{task}"  # in one process, transformers takes folders of one name for one class
    run_example(task, tmp_path / "dense", output)
    rows = check_output(output)
    assert any(name.endswith("%") for name in rows[0])
    assert "reduction asked" in capsys.readouterr().out


def test_defaults_are_the_classes_own():
    from script_arguments import ContrastiveArguments, PruningArguments

    pruning, contrastive = PruningArguments(), ContrastiveArguments()
    assert pruning.num_alignment_tokens == MadtpBlipConfig().num_alignment_tokens
    assert pruning.num_targets == ReductionCallback((0.5, 0.8)).num_targets
    defaults = inspect.signature(RetrievalTrainer).parameters
    assert {name: value.default for name, value in defaults.items() if hasattr(contrastive, name)} == vars(contrastive)


@pytest.mark.slow
def test_help_shows_a_scripts_own_options_and_help_all_the_trainers():
    shown = {}
    for option in ("--help", "--help-all"):
        command = [sys.executable, str(EXAMPLES / "run_nlvr2.py"), option]
        shown[option] = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--target_reduction" in shown["--help"] and "--weight_decay" not in shown["--help"]
    assert "--weight_decay" in shown["--help-all"] and len(shown["--help"].splitlines()) < 80
