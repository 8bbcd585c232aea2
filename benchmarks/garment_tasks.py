"""The studies of methods on photographs of garments instead of digit scenes (see examples/garments.py)."""

import functools
import sys

import torch
import torch.nn.functional as F
from digit_tasks import LOADERS, PREDICTORS, SCORES
from reporting import EXAMPLES


sys.path.append(str(EXAMPLES))
from garments import GARMENTS, load_garment_captions, load_garment_questions


PROMPT = "a photo of a {}"
QUESTIONS_AND_CAPTIONS = {"vqa": load_garment_questions, "clip": load_garment_captions}


@torch.no_grad()
def name_garments(model, collator, batch) -> list[str]:
    """Zero-shot classification: the garment whose caption is nearest to the image."""
    captions = collator.processor.tokenizer(
        [PROMPT.format(name) for name in GARMENTS.values()], padding=True, return_tensors="pt"
    )
    images = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    texts = model.get_text_features(**captions).pooler_output
    nearest = (F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T).argmax(dim=-1)
    return [list(GARMENTS.values())[index] for index in nearest.tolist()]


def score_names(predictions, rows) -> float:
    return sum(name == row["label"] for name, row in zip(predictions, rows)) / len(rows)


def use_photographs(folder, task: str) -> tuple[int, int]:
    """Let the studies' tasks `vqa` and `clip` be about the photographs in `folder`; the metric is accuracy.

    Of validation and test, all photographs are used, whatever number of samples is asked for. They are shuffled: the
    files have one class after another, and a batch should not be of one. Returns how many samples of the task that
    makes.

    Raises:
        ValueError: for another task, and data that `load_garments` can't read.
        FileNotFoundError: if the folder has no such data.
    """
    if task not in QUESTIONS_AND_CAPTIONS:
        raise ValueError(f"Photographs have no task {task}: expected {' or '.join(QUESTIONS_AND_CAPTIONS)}.")

    def load(loader, split, number, seed=0):
        return loader(folder, split, number, seed) if split == "train" else loader(folder, split).shuffle(seed=0)

    for name, loader in QUESTIONS_AND_CAPTIONS.items():
        LOADERS[name] = functools.partial(load, loader)
    PREDICTORS["clip"], SCORES["clip"] = name_garments, score_names
    return len(LOADERS[task]("validation", None)), len(LOADERS[task]("test", None))
