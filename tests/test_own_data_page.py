"""The page docs/own_data.md works as it stands: its files are written and its code is run from top to bottom."""

import pytest


pytest.importorskip("accelerate", reason="the stock Trainer needs the extra `train`")
pytest.importorskip("sklearn", reason="digit scenes need the extra `digits`")
import numpy as np
from transformers import AutoProcessor

from madtp_hf import MadtpBlipForQuestionAnswering

from .helpers.pages import ROOT, run_page


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder that the page's code ran in, and the names that it left."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        patch.setattr("torch.cuda.is_available", lambda: False)  # on the CPU, whatever the machine has
        return folder, run_page(ROOT / "docs/own_data.md", folder)


def test_the_data_is_what_the_page_says(ran):
    names = ran[1]
    assert names["train"]["answers"][:] == [["two"], ["no"], ["seven"]] and len(names["validation"]) == 1
    assert names["captions"]["captions"][:][0] == ["a red seven and a blue two", "two digits"]
    assert names["pairs"].column_names == ["image", "captions", "image_id"] and len(names["pairs"]) == 3


def test_the_model_is_trained_and_saved(ran):
    folder, names = ran
    assert names["trainer"].state.global_step == 3
    assert all(np.isfinite(entry["loss"]) for entry in names["trainer"].state.log_history if "loss" in entry)
    model = MadtpBlipForQuestionAnswering.from_pretrained(folder / "my-blip-vqa")
    assert model.config.pruning_schedule
    AutoProcessor.from_pretrained(folder / "my-blip-vqa")


def test_what_the_page_says_of_a_forgotten_option_is_so(ran):
    """`Trainer` without `remove_unused_columns=False` ends with an error that names the option."""
    from transformers import Trainer, TrainingArguments

    names = ran[1]
    arguments = TrainingArguments(output_dir=str(ran[0] / "forgotten"), use_cpu=True, report_to="none", max_steps=1)
    collator = names["QuestionAnsweringCollator"](names["BlipProcessor"].from_pretrained(ran[0] / "my-blip-vqa"), 1)
    trainer = Trainer(names["model"], arguments, collator, train_dataset=names["train"])
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        trainer.train()
