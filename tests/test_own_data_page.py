"""The page docs/own_data.md works as it stands: its files are written, its images drawn, its code run from top to
bottom."""

import re
from pathlib import Path

import pytest


pytest.importorskip("accelerate", reason="the stock Trainer needs the extra `train`")
pytest.importorskip("sklearn", reason="digit scenes need the extra `digits`")
import numpy as np
from PIL import Image
from transformers import AutoProcessor

from madtp_hf import MadtpBlipForQuestionAnswering
from madtp_hf.data.digit_scenes import draw_scenes


REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "own_data.md").read_text()
# Models of the Hub, and the shipped ones that stand in for them.
MODELS = {
    "Salesforce/blip-vqa-base": "blip-vqa-digits",
    "Salesforce/blip-image-captioning-base": "blip-captioning-digits",
    "Salesforce/blip-itm-base-coco": "blip-retrieval-digits",
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder that the page's code ran in, and the names that it left."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "photos").mkdir()
    questions, captions = blocks("csv")
    (folder / "questions.csv").write_text(questions)
    (folder / "captions.csv").write_text(captions)
    names = sorted(set(re.findall(r"\d{4}\.jpg", questions + captions)))
    for name, image in zip(names, draw_scenes(len(names), "train", np.random.default_rng(0)).images):
        Image.fromarray(image).save(folder / "photos" / name)
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        for block in blocks("python"):
            for name, shipped in MODELS.items():
                block = block.replace(f'"{name}"', repr(str(REPOSITORY / "examples" / shipped)))
            assert "Salesforce" not in block
            # On the CPU, whatever the machine has, and without a crowd of processes.
            block = block.replace("bf16=torch.cuda.is_available()", "use_cpu=True")
            exec(block.replace("dataloader_num_workers=2", "dataloader_num_workers=1"), names)
    return folder, names


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
