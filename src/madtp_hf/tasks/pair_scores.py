"""What retrieval with BLIP and with CLIP share: images with all of their captions, and the recalls of scores."""

import itertools
import math

import torch
from torch.utils.data import DataLoader

from ..data.collators import read_texts
from ..metrics import load_metric
from ..modeling.images import read_image


RECALLED = (1, 5, 10)  # of the metric `retrieval_recall`


class CaptionedImages:
    """Images and all of their captions, encoded for retrieval in both directions.

    Args:
        rows (`datasets.Dataset` or `list[dict]`): with the columns `image` and `captions`, a list of strings.
        processor: the model's processor, of images and texts.
        max_length (`int`, *optional*): truncate captions to this many tokens.
        batch_size (`int`, *optional*, defaults to 64): images per batch.

    Attributes: `texts`, all captions; `input_ids` and `attention_mask`, the tokenized captions; `pixel_batches`, the
    preprocessed images.
    """

    def __init__(self, rows, processor, max_length: int | None = None, batch_size: int = 64):
        self._captions = _captions(rows)
        self.texts = list(itertools.chain.from_iterable(self._captions))
        encoded = read_texts(processor, self.texts, max_length)
        self.input_ids, self.attention_mask = encoded["input_ids"], encoded["attention_mask"]

        def to_pixels(rows):
            images = [read_image(row["image"]) for row in rows]
            return processor.image_processor(images, return_tensors="pt").pixel_values

        self.pixel_batches = DataLoader(rows, batch_size=batch_size, collate_fn=to_pixels)

    def __len__(self) -> int:
        return len(self._captions)

    def recalls(self, image_to_text: torch.Tensor, text_to_image: torch.Tensor) -> dict[str, float]:
        """Compute recall at 1, 5 and 10 in both directions, and their mean `"mean %"`.

        image_to_text: scores (images, texts); text_to_image: scores (texts, images).
        """
        return _recalls(self._captions, image_to_text, text_to_image)

    def by_chance(self) -> dict[str, float]:
        """Return the expected `recalls` of random scores."""
        images, texts, chance = len(self), len(self.texts), {}
        for k in RECALLED:
            drawn = min(k, texts)
            missed = [math.comb(texts - len(own), drawn) / math.comb(texts, drawn) for own in self._captions]
            chance[f"image_to_text@{k} %"] = 1 - sum(missed) / images
        chance |= {f"text_to_image@{k} %": min(k, images) / images for k in RECALLED}
        return chance | {"mean %": sum(chance.values()) / len(chance)}


def score_recalls(predictions, rows) -> dict[str, float]:
    """Return the recalls that a results table shows; predictions: image_to_text and text_to_image scores."""
    return shown_recalls(_recalls(_captions(rows), *predictions))


def shown_recalls(recalls: dict[str, float]) -> dict[str, float]:
    return {name: recalls[name] for name in ("image_to_text@1 %", "text_to_image@1 %", "mean %")}


def _captions(rows) -> list[list[str]]:
    # A column of a `datasets.Dataset` is read without decoding the images of its rows.
    return list(rows["captions"]) if hasattr(rows, "column_names") else [row["captions"] for row in rows]


def _recalls(captions: list[list[str]], image_to_text, text_to_image) -> dict[str, float]:
    starts = itertools.accumulate(map(len, captions), initial=0)
    own = [list(range(*span)) for span in itertools.pairwise(starts)]
    recalls = load_metric("retrieval_recall").compute(
        predictions=image_to_text.numpy(), references=own, text_to_image=text_to_image.numpy()
    )
    return {f"{name.replace('_recall', '')} %": value for name, value in recalls.items()}
