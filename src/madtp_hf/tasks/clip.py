"""Image-text retrieval with CLIP, by the cosine similarity of features."""

import torch
import torch.nn.functional as F

from ..data.collators import RetrievalCollator
from ..families import CLIP
from ..modeling.modeling_madtp_clip import MadtpClipModel
from . import flop_formulas as flops
from . import onnx_parts as parts
from .pair_scores import CaptionedImages, score_recalls
from .task import Task


@torch.no_grad()
def score_by_features(
    model, pixel_batches, input_ids, attention_mask, batch_size: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score every image with every text by the cosine similarity of their features, as CLIP is evaluated.

    Args:
        model (`MadtpClipModel` or `CLIPModel`):
            The model; its current pruning applies.
        pixel_batches (`Iterable[torch.Tensor]`):
            The images, in batches of pixel_values `(B, 3, height, width)`.
        input_ids, attention_mask (`torch.LongTensor` of shape `(num_texts, length)`):
            The texts.
        batch_size (`int`, *optional*, defaults to 256):
            How many texts to encode at a time.

    Returns:
        Two float tensors on the CPU, image_to_text `(num_images, num_texts)` and its transpose.
    """

    def normalised(batches) -> torch.Tensor:
        return F.normalize(torch.cat([features.pooler_output.float() for features in batches]), dim=-1)

    images = normalised(model.get_image_features(pixels.to(model.device)) for pixels in pixel_batches)
    batches = zip(input_ids.split(batch_size), attention_mask.split(batch_size))
    texts = normalised(model.get_text_features(ids.to(model.device), mask.to(model.device)) for ids, mask in batches)
    similarity = (images @ texts.T).cpu()
    return similarity, similarity.T


def _predict_all(model, processor, rows, batch_size: int):
    queries = CaptionedImages(rows, processor, model.config.text_config.max_position_embeddings, batch_size)
    return score_by_features(model, queries.pixel_batches, queries.input_ids, queries.attention_mask)


def _flops(config, vision_tokens, text_tokens, answer_tokens, added):
    """Count CLIP's features of an image and a text, and their product.

    Causal attention counts in full, because it is computed in full.
    """
    vision, text, width = config.vision_config, config.text_config, config.projection_dim
    total = flops.patch_embedding(vision, vision_tokens) + vision_tokens[0] * flops.LAYER_NORM * vision.hidden_size
    total = total + flops.pre_norm_layers(vision, vision_tokens, added.get("vision"))
    total = total + flops.pre_norm_layers(text, text_tokens, added.get("text"))
    total = total + text_tokens[-1] * flops.LAYER_NORM * text.hidden_size + flops.LAYER_NORM * vision.hidden_size
    return total + (vision.hidden_size + text.hidden_size) * width + width


def _encode_clip_images(model, pixel_values):
    return F.normalize(model.get_image_features(pixel_values).pooler_output, dim=-1)


def _encode_clip_texts(model, input_ids, attention_mask):
    texts = parts.pad_texts(model, input_ids, attention_mask)
    return F.normalize(model.get_text_features(*texts).pooler_output, dim=-1)


def _graphs(model, sizes: parts.Sizes) -> dict[str, parts.Graph]:
    images, texts = parts.images(model, sizes), parts.texts(model, sizes)
    return {
        "vision_encoder": parts.Graph(
            "Images: their normalised features.", _encode_clip_images, images, ["image_feature"]
        ),
        "text_encoder": parts.Graph("Texts: their normalised features.", _encode_clip_texts, texts, ["text_feature"]),
    }


TASK = Task(
    name="clip",
    family=CLIP,
    model_class=MadtpClipModel,
    flops=_flops,
    graphs=_graphs,
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
texts = [{text}, "something else"]
inputs = processor(images=image, text=texts, padding=True, return_tensors="pt")
print(model(**inputs).logits_per_image.softmax(dim=-1)[0].tolist())  # how well each text fits""",
    text="two dogs on a beach",
    baseline="Chance",
    pipeline_tag="zero-shot-image-classification",
    tags=("image-text-retrieval",),
    predict_all=_predict_all,
    score=score_recalls,
    embeds=True,
    script="run_clip_retrieval.py",
)
