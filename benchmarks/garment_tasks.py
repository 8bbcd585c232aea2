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
    """Let the studies' tasks `vqa` and `clip` be about the photographs in `folder`.

    Of validation and test, all photographs are used, whatever number of samples is asked for. Returns how many samples
    of the task that makes.
    """

    def load(loader, split, number, seed=0):
        return loader(folder, split, number if split == "train" else None, seed)

    LOADERS["vqa"] = functools.partial(load, load_garment_questions)
    LOADERS["clip"] = functools.partial(load, load_garment_captions)
    PREDICTORS["clip"], SCORES["clip"] = name_garments, score_names
    return len(LOADERS[task]("validation", None)), len(LOADERS[task]("test", None))
