"""Captioning: a caption of an image, which continues a prompt."""

from ..data.collators import CaptioningCollator
from ..metrics import load_metric
from ..modeling.modeling_madtp_blip import MadtpBlipForConditionalGeneration
from . import flop_formulas as flops
from . import onnx_parts as parts
from .task import INPUTS, Task


CAPTION_TOKENS, CAPTION_BEAMS = 20, 3
METRICS = ("bleu", "cider", "rouge")  # those that need no Java


def _generate(model, inputs, **options):
    return model.generate(inputs["pixel_values"], num_beams=CAPTION_BEAMS, **options)


def _predict(model, processor, batch) -> list[str]:
    collator = TASK.make_collator(model, processor)
    prompt = collator.prompt_ids(len(batch["pixel_values"])).to(model.device)
    room = model.config.text_config.max_position_embeddings - prompt.shape[1]
    written = _generate(model, batch, input_ids=prompt, max_new_tokens=min(CAPTION_TOKENS, room))
    captions = processor.tokenizer.batch_decode(written, skip_special_tokens=True)
    return [caption.removeprefix(collator.prompt).strip() for caption in captions]


def _score(predictions, rows) -> dict[str, float]:
    references = [list(row["captions"]) for row in rows]
    scores = load_metric(TASK.metric).compute(predictions=predictions, references=references, metrics=METRICS)
    shown = {name: value for name, value in scores.items() if name not in ("bleu_1", "bleu_2", "bleu_3")}
    return {f"{name} %" if name == "bleu_4" else name: value for name, value in shown.items()}


def _flops(config, vision_tokens, text_tokens, answer_tokens, added):
    total = flops.vision_encoder(config, vision_tokens, added.get("vision"))
    return total + flops.text_decoder(config, answer_tokens, vision_tokens[-1], config.vision_config.hidden_size)


def _encode_images_for_decoder(model, pixel_values):
    return parts.for_decoder(model, model._encode_images(pixel_values), True)


def _graphs(model, sizes: parts.Sizes) -> dict[str, parts.Graph]:
    num_states = parts.states(model, sizes, "states")["states"][0].shape[1]
    return {
        "vision_encoder": parts.Graph(
            "Images: what the decoder reads, a mask and the keys and values of its cross-attention.",
            _encode_images_for_decoder,
            parts.images(model, sizes),
            ["encoder_attention_mask", *parts.cache_names(model, "encoder", "present")],
        ),
        "decoder": parts.decoder(model, sizes, num_states, varies=False),
    }


TASK = Task(
    name="captioning",
    model_class=MadtpBlipForConditionalGeneration,
    flops=_flops,
    graphs=_graphs,
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
    usage=INPUTS
    + "print(processor.decode(model.generate(**inputs, num_beams=3, max_new_tokens=20)[0],"
    + " skip_special_tokens=True))",
    text="a picture of",
    baseline="Baseline, with captions of other images",
    pipeline_tag="image-to-text",
    tags=("image-captioning",),
    predict=_predict,
    score=_score,
    generate=_generate,
    timed_tokens=10,
    script="run_captioning.py",
)
