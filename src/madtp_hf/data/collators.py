"""From rows of a data set to the tensors that a model's `forward` takes: one collator a task.

A collator is made with the model's processor; `max_length` cuts longer texts to so many tokens.
"""

import hashlib
import random
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.utils.data


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


def _hash(text: str) -> int:
    """A number of 56 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _generator(seed: int, seen: Counter, rows: list) -> random.Random:
    """For the draws of a batch with these rows: it follows from the seed, the rows and how often they came together, `seen`.

    Not from the draws before: so training that is resumed goes on with the draws that it would have made. In a data loader's workers, most of which begin
    anew every epoch and so count in vain, it follows from the loader's seed of the epoch as well.
    """
    batch = _hash(repr(rows))
    seen[batch] += 1
    worker = torch.utils.data.get_worker_info()
    return random.Random(_hash(f"{seed} {batch} {seen[batch]}{'' if worker is None else f' {worker.seed}'}"))


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
    _seen: Counter = field(init=False, repr=False, default_factory=Counter)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = _tokens(self.processor, [row["question"] for row in rows], self.max_length)
        batch["pixel_values"] = _pixels(self.processor, [row["image"] for row in rows])
        if all(row.get("answer") or row.get("answers") for row in rows):
            given = [[row["answer"]] if row.get("answer") else row["answers"] for row in rows]
            draw = _generator(self.seed, self._seen, [(row["question"], answers) for row, answers in zip(rows, given)])
            answers = [draw.choice(answers) for answers in given]
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
    _seen: Counter = field(init=False, repr=False, default_factory=Counter)

    def prompt_ids(self, batch_size: int) -> torch.Tensor:
        """The prompt as `generate` takes it, (batch_size, length)."""
        return self.processor.tokenizer([self.prompt] * batch_size, return_tensors="pt").input_ids

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        draw = _generator(self.seed, self._seen, [row["captions"] for row in rows])
        captions = [f"{self.prompt} {draw.choice(row['captions'])}".strip() for row in rows]
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
    _seen: Counter = field(init=False, repr=False, default_factory=Counter)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        draw = _generator(self.seed, self._seen, [(row["image_id"], row["captions"]) for row in rows])
        batch = _tokens(self.processor, [draw.choice(row["captions"]) for row in rows], self.max_length)
        batch["pixel_values"] = _pixels(self.processor, [row["image"] for row in rows])
        batch["image_ids"] = torch.tensor([_hash(row["image_id"]) for row in rows])
        batch["return_loss"] = True
        return batch
