"""Visual reasoning, NLVR2: whether a sentence about two images is true."""

from ..data.collators import VisualReasoningCollator
from ..metrics import load_metric
from ..modeling.modeling_madtp_blip import MadtpBlipForImagesAndTextClassification
from . import flop_formulas as flops
from . import onnx_parts as parts
from .task import Task


def _predict(model, processor, batch) -> list[int]:
    return model(**{name: value for name, value in batch.items() if name != "labels"}).logits.argmax(-1).tolist()


def _score(predictions, rows) -> dict[str, float]:
    references = [row["label"] for row in rows]
    scores = load_metric(TASK.metric).compute(predictions=predictions, references=references)
    return {f"{name} %": value for name, value in scores.items()}


def _flops(config, vision_tokens, text_tokens, answer_tokens, added):
    """Count NLVR2's pass over two images; `vision_tokens` is (layers + 1, 2, B)."""
    images = vision_tokens.unbind(1)
    total = sum(flops.vision_encoder(config, image, added.get("vision")) for image in images)
    total = total + flops.text_encoder(config, text_tokens, [image[-1] for image in images], added.get("text"))
    width = config.text_config.hidden_size
    return total + width**2 + width * 2  # the classification head


def _classify_pairs(model, input_ids, attention_mask, left_states, right_states):
    texts = parts.pad_texts(model, input_ids, attention_mask)
    return model.cls_head(
        model._encode_text(*texts, *parts.layout(left_states), *parts.layout(right_states)).first_states
    )


def _graphs(model, sizes: parts.Sizes) -> dict[str, parts.Graph]:
    return {
        "vision_encoder": parts.vision_encoder_graph(model, sizes),
        "classifier": parts.Graph(
            "Sentences about pairs of images: scores of false and true.",
            _classify_pairs,
            {**parts.texts(model, sizes), **parts.states(model, sizes, "left_states", "right_states")},
            ["logits"],
        ),
    }


TASK = Task(
    name="nlvr2",
    model_class=MadtpBlipForImagesAndTextClassification,
    flops=_flops,
    graphs=_graphs,
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
    predict=_predict,
    score=_score,
    script="run_nlvr2.py",
)
