"""Collators that turn rows of a data set into the tensors that a model's `forward` takes: one collator per task.

A collator is created with the model's processor; `max_length` truncates longer texts to that many tokens. An image is
a PIL image, an array (height, width, 3) of uint8, or a path (`str` or `pathlib.Path`); its EXIF orientation is
applied, as in the pipeline. A row that can't be used raises a `ValueError` that names it. With `Trainer`, pass
`TrainingArguments(remove_unused_columns=False)`: by default it removes the columns that `forward` doesn't know.
"""

import hashlib
import random
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.utils.data
from transformers import ProcessorMixin

from ..modeling.images import read_image
from ..modeling.texts import tokenize


def _column(rows: list[dict], name: str) -> list:
    """Return the values of a column; raise a `ValueError` for a row that lacks it."""
    for index, row in enumerate(rows):
        if row.get(name) is None:
            has = "None as" if name in row else f"only {list(row)} and no"
            raise ValueError(
                f"Row {index} of the batch has {has} {name!r}: expected a value. If the data set has it, Trainer has"
                " removed it, because the model's forward has no such argument: pass"
                " TrainingArguments(remove_unused_columns=False)."
            )
    return [row[name] for row in rows]


def _texts(rows: list[dict], name: str) -> list[str]:
    """Return the values of a column of strings; raise a `ValueError` for a row with anything else."""
    texts = _column(rows, name)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"Row {index} of the batch has {text!r} as {name!r}: expected a string.")
    return texts


def _captions(rows: list[dict]) -> list[list[str]]:
    """Return the captions of each row, at least one; a string counts as one caption."""
    of_rows = [[captions] if isinstance(captions, str) else list(captions) for captions in _column(rows, "captions")]
    for index, captions in enumerate(of_rows):
        if not captions or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(
                f"Row {index} of the batch has {captions!r} as 'captions': expected a string or a list of at least"
                " one."
            )
    return of_rows


def _answers(rows: list[dict]) -> list[list[str]] | None:
    """Return the non-blank answers of each row, at least one; None if no row has any, as in prediction."""
    # An empty string is a missing answer; no column, None or an empty list marks a question to be answered.
    if all(row.get(name) in (None, [], ()) for row in rows for name in ("answer", "answers")):
        return None
    found = []
    for index, row in enumerate(rows):
        given = row.get("answer") or row.get("answers") or []
        given = given if isinstance(given, (list, tuple)) else [given]
        found.append([answer for answer in given if isinstance(answer, str) and answer.strip()])
        if not found[-1]:
            given = {name: row[name] for name in ("answer", "answers") if name in row}
            raise ValueError(
                f"Row {index} of the batch, question {row['question']!r}, has no answer"
                f" ({given or 'no such column'}): expected a string as 'answer' or a list of strings as 'answers';"
                " leave such rows out, or, to predict, the answers of all rows."
            )
    return found


def _labels(rows: list[dict]) -> torch.Tensor | None:
    """Return the labels (B,); None if no row has one, as in prediction."""
    if all(row.get("label") is None for row in rows):
        return None
    labels = []
    for index, row in enumerate(rows):
        label = row.get("label")
        # Test splits on the Hub use -1 for "unknown"; the model would reject it without naming the row.
        if isinstance(label, str) or label not in (0, 1):
            raise ValueError(
                f"Row {index} of the batch, sentence {row['sentence']!r}, has the label {label!r}: expected 1"
                " where the sentence is true and 0 where it is false; to predict, leave the label out of all rows."
            )
        labels.append(int(label))
    return torch.tensor(labels)


def _pixels(processor, rows: list[dict], *names: str) -> torch.Tensor:
    """Return the images of the columns `names`, row by row, as pixel values (B * len(names), 3, H, W)."""
    columns = [_column(rows, name) for name in names]
    images = []
    for index, of_row in enumerate(zip(*columns)):
        for name, image in zip(names, of_row):
            try:
                images.append(read_image(image))
            except (TypeError, ValueError) as error:
                raise ValueError(f"Row {index} of the batch, {name!r}: {error}") from error
    return processor.image_processor(images=images, return_tensors="pt").pixel_values


def read_texts(processor, texts: list[str], max_length: int | None = None, **options) -> dict[str, torch.Tensor]:
    """Tokenize texts, padded; those of more than `max_length` tokens are truncated, with one warning."""
    options |= {"padding": True, "return_tensors": "pt"}
    if max_length is None:
        encoded = processor.tokenizer(texts, **options)
    else:
        encoded = tokenize(processor.tokenizer, texts, max_length, True, **options)
    return {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}


def _decoder_tokens(processor, texts, start_token_id: int, max_length: int | None = None) -> dict[str, torch.Tensor]:
    """Tokenize with padding on the right, whatever the tokenizer's default; the first token is `start_token_id`."""
    encoded = read_texts(processor, texts, max_length, padding_side="right")
    encoded["input_ids"][:, 0] = start_token_id
    return encoded


def _hash(text: str) -> int:
    """Return a 56-bit hash of the text that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _generator(seed: int, seen: Counter, rows: list) -> random.Random:
    """Return the random generator for a batch's draws, seeded by `seed`, the rows and how often they came together.

    `seen` counts how often each batch has occurred. The generator doesn't depend on earlier draws, so resumed training
    makes the same draws as uninterrupted training. Most data loader workers are restarted every epoch and lose their
    count, so in a worker the generator also depends on the loader's seed for that epoch.
    """
    batch = _hash(repr(rows))
    seen[batch] += 1
    worker = torch.utils.data.get_worker_info()
    return random.Random(_hash(f"{seed} {batch} {seen[batch]}{'' if worker is None else f' {worker.seed}'}"))


@dataclass
class QuestionAnsweringCollator:
    """Collate rows for question answering: `image`, `question` and `answer`, or `answers` by several people.

    One of several answers is drawn at random, so each answer is weighted by how often it was given, as in BLIP.
    Returns `pixel_values`, `input_ids`, `attention_mask` and `labels`. There are no labels if no row has an answer; if
    only some rows have one, a `ValueError` names the first row without.

    processor: the model's. decoder_start_token_id: the token that answers start with,
    `model.config.text_config.bos_token_id`. max_length: longer questions are truncated to this many tokens. seed: for
    drawing answers.
    """

    processor: ProcessorMixin
    decoder_start_token_id: int
    max_length: int | None = None
    seed: int = 0
    _seen: Counter = field(init=False, repr=False, default_factory=Counter)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = read_texts(self.processor, _texts(rows, "question"), self.max_length)
        batch["pixel_values"] = _pixels(self.processor, rows, "image")
        given = _answers(rows)
        if given is not None:
            draw = _generator(self.seed, self._seen, [(row["question"], answers) for row, answers in zip(rows, given)])
            answers = [draw.choice(answers) for answers in given]
            encoded = _decoder_tokens(self.processor, answers, self.decoder_start_token_id)
            batch["labels"] = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
        return batch


@dataclass
class VisualReasoningCollator:
    """Collate rows for NLVR2: `left_image`, `right_image`, `sentence` and `label`.

    Returns `pixel_values` (B, 2, 3, H, W), `input_ids`, `attention_mask` and `labels` (B,); no labels if no row has
    one.
    """

    processor: ProcessorMixin
    max_length: int | None = None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = read_texts(self.processor, _texts(rows, "sentence"), self.max_length)
        batch["pixel_values"] = _pixels(self.processor, rows, "left_image", "right_image").unflatten(0, (-1, 2))
        labels = _labels(rows)
        return batch if labels is None else {**batch, "labels": labels}


@dataclass
class CaptioningCollator:
    """Collate rows for captioning: `image` and `captions`, of which one is drawn for each image.

    Returns `pixel_values`, `input_ids`, `attention_mask` and `labels`. Labels are -100 at the prompt's tokens: the
    prompt is given, not learned.

    processor: the model's. decoder_start_token_id: the token that captions start with,
    `model.config.text_config.bos_token_id`. prompt: what precedes each caption. max_length: longer captions are
    truncated to this many tokens. seed: for drawing captions.
    """

    processor: ProcessorMixin
    decoder_start_token_id: int
    prompt: str = "a picture of"
    max_length: int | None = None
    seed: int = 0
    _seen: Counter = field(init=False, repr=False, default_factory=Counter)

    def prompt_ids(self, batch_size: int) -> torch.Tensor:
        """Return the prompt's token ids (batch_size, length), as `generate` takes them."""
        return self.processor.tokenizer([self.prompt] * batch_size, return_tensors="pt").input_ids

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        given = _captions(rows)
        draw = _generator(self.seed, self._seen, given)
        captions = [f"{self.prompt} {draw.choice(captions)}".strip() for captions in given]
        batch = _decoder_tokens(self.processor, captions, self.decoder_start_token_id, self.max_length)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, : self.prompt_ids(1).shape[1] - 1] = -100  # the prompt's last token is the tokenizer's [SEP]
        return {**batch, "labels": labels, "pixel_values": _pixels(self.processor, rows, "image")}


@dataclass
class RetrievalCollator:
    """Collate rows for retrieval training: `image`, `captions` (one is drawn for each image) and `image_id`.

    Returns `pixel_values`, `input_ids`, `attention_mask`, `image_ids` (B,) and `return_loss=True`. Rows with the same
    `image_id` are not negatives of each other.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    seed: int = 0
    _seen: Counter = field(init=False, repr=False, default_factory=Counter)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor | bool]:
        image_ids, captions = _texts(rows, "image_id"), _captions(rows)
        draw = _generator(self.seed, self._seen, list(zip(image_ids, captions)))
        batch = read_texts(self.processor, [draw.choice(of_image) for of_image in captions], self.max_length)
        batch["pixel_values"] = _pixels(self.processor, rows, "image")
        batch["image_ids"] = torch.tensor([_hash(image_id) for image_id in image_ids])
        return {**batch, "return_loss": True}
