"""What a task is: everything specific to one, as its file fills it in. The registry is in `tasks/__init__.py`."""

from collections.abc import Callable
from dataclasses import dataclass

from ..families import BLIP, Family
from ..modeling.pruned_model import PrunedModelMixin


# Example code of a model card: {text} stands for a text.
INPUTS = """image = Image.open("image.jpg").convert("RGB")
text = {text}
inputs = processor(images=image, text=text, return_tensors="pt")
"""


@dataclass(frozen=True)
class Task:
    """Everything specific to one task: model, data, evaluation, checkpoints and model card."""

    name: str
    # The model.
    model_class: type[PrunedModelMixin]
    flops: Callable  # (config, vision_tokens, text_tokens, answer_tokens, added) -> (B,), see `flop_formulas`
    graphs: Callable  # (model, sizes) -> the ONNX graphs by name, see `onnx_parts`
    # The data: the metric's folder in `metrics/`, and the main column of a results table, with its title.
    collator: type
    metric: str
    headline: str
    headline_title: str
    # Evaluation. (predictions, rows) -> scores by name, shares where the name ends in "%".
    score: Callable
    # Checkpoints: the auto class that loads one, and the parts of an original checkpoint besides BLIP's vision tower.
    auto_class: str
    original_parts: tuple[str, ...]
    # The model card: example code with {text} as placeholder, a text for it, and the kind of language-only or chance
    # baseline.
    title: str
    what: str
    usage: str
    text: str
    baseline: str
    script: str  # the training script in `examples/`
    pipeline_tag: str | None = None  # the Hub's name for the task
    tags: tuple[str, ...] = ()

    family: Family = BLIP
    num_images: int = 1  # per sample
    image_columns: tuple[str, ...] = ("image",)  # columns of the data set, as the collator takes them
    text_column: str | None = None  # the text's column; None if the model takes no text
    target_columns: tuple[str, ...] = ()  # columns with the metric's references, of which a data set has one
    text_encoder: str | None = "text_encoder"  # the model's attribute; None without a text encoder
    decoder_inputs: str | None = None  # the `forward` argument for the decoder's start token; None without a decoder
    pipeline_call: str | None = None  # a call of the checkpoints' pipeline, with {text} as placeholder
    # (model, processor, batch) -> a prediction per sample; None for a task that compares all samples with each other,
    # for which `predict_all` takes (model, processor, rows, batch_size).
    predict: Callable | None = None
    predict_all: Callable | None = None
    # (model, inputs, **generation options) -> token ids, if the model answers in words, and how many to write when it
    # is timed.
    generate: Callable | None = None
    timed_tokens: int = 0
    embeds: bool = False  # whether the model gives images and texts features of one space

    @property
    def pipeline(self) -> str | None:
        """The task name that `transformers.pipeline` takes for the checkpoints' pipeline; None without one."""
        named = self.model_class._task_pipeline
        return named[0] if named else None

    def make_collator(self, model, processor):
        """Return the task's collator, which truncates texts at the model's maximum length."""
        text_config = model.config.text_config
        start = [text_config.bos_token_id] if self.decoder_inputs else []
        return self.collator(processor, *start, max_length=text_config.max_position_embeddings)
