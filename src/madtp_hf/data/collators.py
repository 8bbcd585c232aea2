"""From rows of a data set to the tensors that a model's `forward` takes: one collator a task.

A collator is made with the model's processor; `max_length` cuts longer texts to so many tokens.
"""

import hashlib
import random
from dataclasses import dataclass, field

import torch


def _pixels(processor, images) -> torch.Tensor:
    return processor.image_processor(
        images=[image.convert("RGB") for image in images], return_tensors="pt"
    ).pixel_values


def _tokens(processor, texts: list[str], max_length: int | None = None, **options) -> dict[str, torch.Tensor]:
    encoded = processor.tokenizer(
        texts, padding=True, truncation=max_length is not None, max_length=max_length, return_tensors="pt", **options
    )
    return {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}


def _decoder_tokens(processor, texts, start_token_id: int, max_length: int | None = None) -> dict[str, torch.Tensor]:
    """Padding behind the text, whatever the tokenizer does; the first token is what the decoder starts with."""
    encoded = _tokens(processor, texts, max_length, padding_side="right")
    encoded["input_ids"][:, 0] = start_token_id
    return encoded


@dataclass
class QuestionAnsweringCollator:
    """Rows with `image`, `question` and `answer`, or the `answers` of several people, -> what question answering takes.

    Of several answers one is drawn, so that each counts as often as people gave it, as BLIP weighs them. Gives `pixel_values`, `input_ids`,
    `attention_mask` and `labels`; no labels for rows without an answer.

    Args:
        processor (`BlipProcessor`):
            The model's.
        decoder_start_token_id (`int`):
            What answers start with: `model.config.text_config.bos_token_id`.
        max_length (`int`, *optional*):
            Longer questions are cut to so many tokens.
        seed (`int`, *optional*, defaults to 0):
            Of the draw.
    """

    processor: object
    decoder_start_token_id: int
    max_length: int | None = None
    seed: int = 0
    _random: random.Random = field(init=False, repr=False)

    def __post_init__(self):
        self._random = random.Random(self.seed)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = _tokens(self.processor, [row["question"] for row in rows], self.max_length)
        batch["pixel_values"] = _pixels(self.processor, [row["image"] for row in rows])
        if all(row.get("answer") or row.get("answers") for row in rows):
            answers = [row.get("answer") or self._random.choice(row["answers"]) for row in rows]
            encoded = _decoder_tokens(self.processor, answers, self.decoder_start_token_id)
            batch["labels"] = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
        return batch


@dataclass
class VisualReasoningCollator:
    """Rows with `left_image`, `right_image`, `sentence` and `label` -> what NLVR2's model takes.

    Gives `pixel_values` (B, 2, 3, H, W), `input_ids`, `attention_mask` and `labels` (B,).
    """

    processor: object
    max_length: int | None = None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = _tokens(self.processor, [row["sentence"] for row in rows], self.max_length)
        images = [row[side] for row in rows for side in ("left_image", "right_image")]
        batch["pixel_values"] = _pixels(self.processor, images).unflatten(0, (-1, 2))
        batch["labels"] = torch.tensor([row["label"] for row in rows])
        return batch


@dataclass
class CaptioningCollator:
    """Rows with `image` and `captions` -> what captioning takes; one caption of each image is drawn.

    Gives `pixel_values`, `input_ids`, `attention_mask` and `labels`, where the tokens of the prompt, which is given and not learned, are at -100.

    Args:
        processor (`BlipProcessor`):
            The model's.
        decoder_start_token_id (`int`):
            What captions start with: `model.config.text_config.bos_token_id`.
        prompt (`str`, *optional*, defaults to `"a picture of"`):
            What stands before each caption.
        max_length (`int`, *optional*):
            Longer captions are cut to so many tokens.
        seed (`int`, *optional*, defaults to 0):
            Of the draw.
    """

    processor: object
    decoder_start_token_id: int
    prompt: str = "a picture of"
    max_length: int | None = None
    seed: int = 0
    _random: random.Random = field(init=False, repr=False)

    def __post_init__(self):
        self._random = random.Random(self.seed)

    def prompt_ids(self, batch_size: int) -> torch.Tensor:
        """The prompt as `generate` takes it, (batch_size, length)."""
        return self.processor.tokenizer([self.prompt] * batch_size, return_tensors="pt").input_ids

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        captions = [f"{self.prompt} {self._random.choice(row['captions'])}".strip() for row in rows]
        batch = _decoder_tokens(self.processor, captions, self.decoder_start_token_id, self.max_length)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, : self.prompt_ids(1).shape[1] - 1] = -100  # its last token is the tokenizer's [SEP]
        return {**batch, "labels": labels, "pixel_values": _pixels(self.processor, [row["image"] for row in rows])}


@dataclass
class RetrievalCollator:
    """Rows with `image`, `captions` and `image_id` -> what retrieval trains on; one caption of each image is drawn.

    Gives `pixel_values`, `input_ids`, `attention_mask`, `image_ids` (B,) and `return_loss=True`. Rows of one `image_id` are no
    negatives of each other.
    """

    processor: object
    max_length: int | None = None
    seed: int = 0
    _random: random.Random = field(init=False, repr=False)

    def __post_init__(self):
        self._random = random.Random(self.seed)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = _tokens(self.processor, [self._random.choice(row["captions"]) for row in rows], self.max_length)
        batch["pixel_values"] = _pixels(self.processor, [row["image"] for row in rows])
        # A number for each image, the same in every process: identifiers are strings.
        ids = [
            int.from_bytes(hashlib.blake2b(row["image_id"].encode(), digest_size=7).digest(), "big") for row in rows
        ]
        batch["image_ids"] = torch.tensor(ids)
        batch["return_loss"] = True
        return batch
