"""The tasks: everything that is true of one task alone. To add a task, add an entry to `TASKS`."""

from collections.abc import Callable
from dataclasses import dataclass

from . import flop_formulas
from .data.collators import (
    CaptioningCollator,
    QuestionAnsweringCollator,
    RetrievalCollator,
    VisualReasoningCollator,
)
from .modeling.modeling_madtp_blip import (
    MadtpBlipForConditionalGeneration,
    MadtpBlipForImagesAndTextClassification,
    MadtpBlipForImageTextRetrieval,
    MadtpBlipForQuestionAnswering,
)
from .modeling.modeling_madtp_clip import MadtpClipModel


@dataclass(frozen=True)
class Task:
    """The properties of one task."""

    name: str
    # The model.
    model_class: type
    flops: Callable  # (config, vision_tokens, text_tokens, answer_tokens, prunes) -> (B,), see `flop_formulas`
    # The data: the metric's folder in `metrics/`, and the column of a results table that counts, with its title.
    collator: type
    metric: str
    headline: str
    headline_title: str
    # Checkpoints: what loads one, and the parts of an original BLIP checkpoint besides the vision tower.
    auto_class: str
    original_parts: tuple[str, ...]
    # The model card: how to ask the model, with {text} in place of a text; a text; what the baseline knows.
    title: str
    what: str
    usage: str
    text: str
    baseline: str
    pipeline_tag: str | None = None  # the Hub's name for the task
    tags: tuple[str, ...] = ()

    family: str = "BLIP"
    num_images: int = 1  # of a sample
    image_columns: tuple[str, ...] = ("image",)  # of a row of data, as the collator takes it
    text_column: str | None = None  # the row's text; None where the model reads none
    target_columns: tuple[str, ...] = ()  # what the metric compares predictions with: one of these
    text_encoder: str | None = "text_encoder"  # the model's attribute; None without one
    decoder_inputs: str | None = (
        None  # the argument of `forward` where the decoder's start token goes; None without one
    )
    pipeline_call: str | None = None  # of the pipeline that checkpoints bring, with {text} in place of a text

    @property
    def pipeline(self) -> str | None:
        """The name by which `transformers.pipeline` knows the pipeline that checkpoints bring; None without one."""
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
    """Return the task of that name; a `ValueError` lists the known names for any other."""
    if name not in TASKS:
        raise ValueError(f"task={name!r}: expected one of {', '.join(map(repr, TASKS))}.")
    return TASKS[name]


def task_of(config) -> tuple[Task, str]:
    """Return the task of a configuration and its model class's name, of this package or, without the prefix, of
    transformers.

    Args:
        config: A configuration, or whatever has its attributes `architectures` and `auto_map`.

    Raises:
        ValueError: if it names no model of a task.
    """
    tasks = {task.model_class.__name__.removeprefix("Madtp"): task for task in TASKS.values()}
    tasks["CLIPModel"] = tasks["ClipModel"]  # transformers spells it so
    # `architectures` is only sure in a saved configuration: a model made by `from_blip` still has the dense one's.
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
