"""From rows of a data set to the tensors that a model's `forward` takes."""

from dataclasses import dataclass

import torch


@dataclass
class QuestionAnsweringCollator:
    """Rows with `image`, `question` and `answer` -> `pixel_values`, `input_ids`, `attention_mask` and `labels`.

    Args:
        processor (`BlipProcessor`):
            The model's.
        decoder_start_token_id (`int`):
            What answers start with: `model.config.text_config.bos_token_id`.
        max_length (`int`, *optional*):
            Longer questions are cut to so many tokens.
    """

    processor: object
    decoder_start_token_id: int
    max_length: int | None = None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        images = [row["image"].convert("RGB") for row in rows]
        batch = dict(
            tokenizer(
                [row["question"] for row in rows],
                padding=True,
                truncation=self.max_length is not None,
                max_length=self.max_length,
                return_tensors="pt",
            )
        )
        batch.pop("token_type_ids", None)
        batch["pixel_values"] = self.processor.image_processor(images=images, return_tensors="pt").pixel_values
        answers = tokenizer([row["answer"] for row in rows], padding=True, padding_side="right", return_tensors="pt")
        labels = answers.input_ids.masked_fill(answers.attention_mask == 0, -100)
        labels[:, 0] = self.decoder_start_token_id
        batch["labels"] = labels
        return batch
