"""The registry of tasks, with everything specific to one task. To add a task, add an entry to `_ENTRIES`."""

from collections.abc import Callable
from dataclasses import dataclass

from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.collators import (
    CaptioningCollator,
    QuestionAnsweringCollator,
    RetrievalCollator,
    VisualReasoningCollator,
)
from ..modeling.modeling_madtp_blip import (
    MadtpBlipForConditionalGeneration,
    MadtpBlipForImagesAndTextClassification,
    MadtpBlipForImageTextRetrieval,
    MadtpBlipForQuestionAnswering,
)
from ..modeling.modeling_madtp_clip import MadtpClipModel
from . import flop_formulas


IN_MEMORY = 256  # up to this many samples, tensors are kept; beyond, each pass reads the images again


@dataclass(frozen=True)
class Task:
    """Everything specific to one task: model, data, checkpoints and model card."""

    name: str
    # The model.
    model_class: type
    flops: Callable  # (config, vision_tokens, text_tokens, answer_tokens, prunes) -> (B,), see `flop_formulas`
    # The data: the metric's folder in `metrics/`, and the main column of a results table, with its title.
    collator: type
    metric: str
    headline: str
    headline_title: str
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
    pipeline_tag: str | None = None  # the Hub's name for the task
    tags: tuple[str, ...] = ()

    family: str = "BLIP"
    num_images: int = 1  # per sample
    image_columns: tuple[str, ...] = ("image",)  # columns of the data set, as the collator takes them
    text_column: str | None = None  # the text's column; None if the model takes no text
    target_columns: tuple[str, ...] = ()  # columns with the metric's references, of which a data set has one
    text_encoder: str | None = "text_encoder"  # the model's attribute; None without a text encoder
    decoder_inputs: str | None = None  # the `forward` argument for the decoder's start token; None without a decoder
    pipeline_call: str | None = None  # a call of the checkpoints' pipeline, with {text} as placeholder

    @property
    def pipeline(self) -> str | None:
        """The task name that `transformers.pipeline` takes for the checkpoints' pipeline; None without one."""
        return self.model_class._task_pipeline and self.model_class._task_pipeline[0]


_INPUTS = """image = Image.open("image.jpg").convert("RGB")
text = {text}
inputs = processor(images=image, text=text, return_tensors="pt")
"""
_ENTRIES = (
    Task(
        name="vqa",
        model_class=MadtpBlipForQuestionAnswering,
        flops=flop_formulas.question_answering,
        decoder_inputs="decoder_input_ids",
        collator=QuestionAnsweringCollator,
        text_column="question",
        target_columns=("answers", "answer"),
        metric="vqa_accuracy",
        headline="accuracy %",
        headline_title="accuracy",
        auto_class="AutoModelForVisualQuestionAnswering",
        pipeline_call='ask(image="image.jpg", question={text})',
        original_parts=("text_encoder", "text_decoder"),
        title="question answering",
        what="answers questions about images",
        usage=_INPUTS + "print(processor.decode(model.generate(**inputs)[0], skip_special_tokens=True))",
        text="how many dogs are there?",
        baseline="Language-only baseline, from the words of the questions",
        pipeline_tag="visual-question-answering",
    ),
    Task(
        name="captioning",
        model_class=MadtpBlipForConditionalGeneration,
        flops=flop_formulas.captioning,
        text_encoder=None,
        decoder_inputs="input_ids",
        collator=CaptioningCollator,
        target_columns=("captions",),
        metric="caption_metrics",
        headline="bleu_4 %",
        headline_title="BLEU-4",
        auto_class="AutoModelForImageTextToText",
        pipeline_call='caption("image.jpg", prompt={text}, generate_kwargs={{"num_beams": 3}})',
        original_parts=("text_decoder",),
        title="captioning",
        what="writes captions of images",
        usage=_INPUTS
        + "print(processor.decode(model.generate(**inputs, num_beams=3, max_new_tokens=20)[0],"
        + " skip_special_tokens=True))",
        text="a picture of",
        baseline="Baseline, with captions of other images",
        pipeline_tag="image-to-text",
        tags=("image-captioning",),
    ),
    Task(
        name="nlvr2",
        model_class=MadtpBlipForImagesAndTextClassification,
        flops=flop_formulas.visual_reasoning,
        num_images=2,
        collator=VisualReasoningCollator,
        image_columns=("left_image", "right_image"),
        text_column="sentence",
        target_columns=("label",),
        metric="nlvr2",
        headline="accuracy %",
        headline_title="accuracy",
        auto_class="AutoModel",
        pipeline_call='judge(images=["left.jpg", "right.jpg"], text={text})',
        original_parts=("text_encoder", "cls_head"),
        title="visual reasoning",
        what="tells whether a sentence about two images is true",
        usage="""images = [Image.open(side).convert("RGB") for side in ("left.jpg", "right.jpg")]
text = {text}
inputs = processor(images=images, text=text, return_tensors="pt")
inputs["pixel_values"] = inputs["pixel_values"].unsqueeze(0)  # one pair
print(model(**inputs).logits.softmax(dim=-1)[0, 1].item())  # how likely it is true""",
        text="there are two dogs in the left image",
        baseline="Language-only baseline, from the words of the sentences",
        tags=("visual-reasoning", "nlvr2"),
    ),
    Task(
        name="retrieval",
        model_class=MadtpBlipForImageTextRetrieval,
        flops=flop_formulas.retrieval,
        collator=RetrievalCollator,
        text_column="captions",
        target_columns=("captions",),
        metric="retrieval_recall",
        headline="mean %",
        headline_title="mean recall",
        auto_class="AutoModel",
        pipeline_call='match(image="image.jpg", text=[{text}, "something else"])',
        original_parts=("text_encoder", "vision_proj", "text_proj", "itm_head"),
        title="retrieval",
        what="matches images and texts",
        usage=_INPUTS
        + """print(model(**inputs).itm_score.softmax(dim=-1)[0, 1].item())  # how likely they match
print(model(**inputs, use_itm_head=False).itm_score.item())  # their cosine similarity""",
        text="two dogs on a beach",
        baseline="Chance",
        tags=("image-text-retrieval", "image-text-matching"),
    ),
    Task(
        name="clip",
        family="CLIP",
        model_class=MadtpClipModel,
        flops=flop_formulas.contrastive_pair,
        text_encoder="text_model",
        collator=RetrievalCollator,
        text_column="captions",
        target_columns=("captions",),
        metric="retrieval_recall",
        headline="mean %",
        headline_title="mean recall",
        auto_class="AutoModelForZeroShotImageClassification",
        original_parts=("visual", "transformer", "token_embedding", "ln_final", "positional_embedding"),
        title="image and text features",
        what="maps images and texts to a common space",
        usage="""image = Image.open("image.jpg").convert("RGB")
texts = [{text}, "a photo of something else"]
inputs = processor(images=image, text=texts, padding=True, return_tensors="pt")
print(model(**inputs).logits_per_image.softmax(dim=-1)[0].tolist())  # how well each text fits""",
        text="two dogs on a beach",
        baseline="Chance",
        pipeline_tag="zero-shot-image-classification",
        tags=("image-text-retrieval",),
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in _ENTRIES}


def get_task(name: str) -> Task:
    """Return the task of this name; raise a `ValueError` that lists all names if there is none."""
    if name not in TASKS:
        raise ValueError(f"task={name!r}: expected one of {', '.join(map(repr, TASKS))}.")
    return TASKS[name]


def task_of(config) -> tuple[Task, str]:
    """Return the task of a configuration and the name of its model class, ours or transformers' (without "Madtp").

    Args:
        config: A configuration, or an object with its attributes `architectures` and `auto_map`.

    Raises:
        ValueError: if the configuration names no task's model.
    """
    tasks = {task.model_class.__name__.removeprefix("Madtp"): task for task in TASKS.values()}
    tasks["CLIPModel"] = tasks["ClipModel"]  # transformers' spelling
    # `architectures` is only reliable in a saved configuration: after `from_blip` it still names the dense model.
    named = [
        (getattr(config, "auto_map", None) or {}).get("AutoModel"),
        *(getattr(config, "architectures", None) or []),
    ]
    for name in filter(None, named):
        model_class = name.rpartition(".")[2]
        if model_class.removeprefix("Madtp") in tasks:
            return tasks[model_class.removeprefix("Madtp")], model_class
    raise ValueError(
        f"The configuration has architectures={getattr(config, 'architectures', None)!r}: expected one of"
        f" {', '.join(tasks)}, or Madtp before these. Pass the configuration of a saved checkpoint."
    )


def make_collator(model, processor):
    """Return the collator of a model's task, which truncates texts at the model's maximum length."""
    task, text_config = TASKS[model.task], model.config.text_config
    start = [text_config.bos_token_id] if task.decoder_inputs else []
    return task.collator(processor, *start, max_length=text_config.max_position_embeddings)


def make_batches(model, processor, rows: list[dict], batch_size: int):
    """Make batches that can be read many times: a list for a few samples, a `DataLoader` for many."""
    if TASKS[model.task].text_column is None:  # captioning: the collator needs captions, a forward pass doesn't
        rows = [{"captions": [""], **row} for row in rows]
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=make_collator(model, processor))
    if len(rows) > IN_MEMORY:
        return loader
    return list(tqdm(loader, desc="reading images", unit=" batches", leave=False))
