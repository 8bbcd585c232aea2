"""Image-text retrieval with BLIP, in two stages: features select a shortlist, and the matching head scores it."""

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ..data.collators import RetrievalCollator
from ..modeling.modeling_madtp_blip import MadtpBlipForImageTextRetrieval
from ..modeling.retrieval_loss import is_distributed, process_rank
from . import flop_formulas as flops
from . import onnx_parts as parts
from .pair_scores import CaptionedImages, score_recalls
from .task import INPUTS, Task


NOT_LISTED = -100.0  # the score of a pair outside the shortlists, below every other score


@torch.no_grad()
def _encode_images(model, pixel_batches) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Encode batches of pixel_values (B, 3, H, W).

    Returns features (I, E) and, for each of the I images, the states (L, D) of its tokens without padding.
    """
    features, states = [], []
    for pixel_values in pixel_batches:
        images = model._encode_images(pixel_values.to(model.device))
        features.append(model._image_feature(images))
        states.extend(images.states.split(images.sequences.row_counts))
    return torch.cat(features), states


@torch.no_grad()
def score_images_and_texts(
    model, pixel_batches, input_ids, attention_mask, k: int = 128, batch_size: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score images against texts in two stages, as BLIP evaluates retrieval.

    Every image is matched with its k most similar texts, and every text with its k most similar images. A score is the
    matching head's logit plus the cosine similarity. With several processes, each scores its share and all get the
    whole result.

    Args:
        model (`MadtpBlipForImageTextRetrieval`):
            The model; its current pruning applies.
        pixel_batches (`Iterable[torch.Tensor]`):
            The images, in batches of pixel_values `(B, 3, height, width)`.
        input_ids, attention_mask (`torch.LongTensor` of shape `(num_texts, length)`):
            The texts.
        k (`int`, *optional*, defaults to 128):
            The length of a shortlist; BLIP uses 256 for COCO and 128 for Flickr30k.
        batch_size (`int`, *optional*, defaults to 256):
            How many pairs to match at a time.

    Returns:
        Two float tensors on the CPU, image_to_text `(num_images, num_texts)` and text_to_image `(num_texts,
        num_images)`; -100 for pairs outside the shortlists.

    Raises:
        ValueError: if k is below 1.
    """
    if k < 1:
        raise ValueError(f"k={k}: expected the length of a shortlist, at least 1.")
    input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
    image_features, states = _encode_images(model, pixel_batches)
    text_features = torch.cat(
        [
            model.get_text_features(ids, mask).pooler_output
            for ids, mask in zip(input_ids.split(batch_size), attention_mask.split(batch_size))
        ]
    )
    similarity = image_features.float() @ text_features.float().T  # in bfloat16, many similarities would tie
    rank, processes = process_rank(), torch.distributed.get_world_size() if is_distributed() else 1

    def rescore(similarity, of_images: bool):
        """Match each query with its shortlist: similarity (queries, candidates) -> scores of the same shape."""
        scores = torch.full_like(similarity, NOT_LISTED)
        listed = similarity.topk(min(k, similarity.shape[1]), dim=1).indices
        queries = torch.arange(len(similarity), device=listed.device).unsqueeze(1).expand_as(listed)
        # Sort pairs by image length, because a batch is padded to its longest image.
        pairs = torch.stack([queries.flatten(), listed.flatten()])[:, rank::processes]
        images = pairs[0] if of_images else pairs[1]
        lengths = torch.tensor([len(tokens) for tokens in states], device=images.device)
        pairs = pairs[:, lengths[images].argsort()]
        direction = "images to texts" if of_images else "texts to images"
        for query, candidate in tqdm(
            list(zip(pairs[0].split(batch_size), pairs[1].split(batch_size))), desc=direction, leave=False
        ):
            image, text = (query, candidate) if of_images else (candidate, query)
            tokens = pad_sequence([states[index] for index in image.tolist()], batch_first=True)
            mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[image].unsqueeze(1)
            matching = model.match(input_ids[text], attention_mask[text], tokens, mask)[:, 1]
            scores[query, candidate] = matching + similarity[query, candidate]
        if processes > 1:
            torch.distributed.all_reduce(scores, torch.distributed.ReduceOp.MAX)
        return scores.cpu()

    return rescore(similarity, True), rescore(similarity.T.contiguous(), False)


def _predict_all(model, processor, rows, batch_size: int):
    queries = CaptionedImages(rows, processor, model.config.text_config.max_position_embeddings, batch_size)
    return score_images_and_texts(model, queries.pixel_batches, queries.input_ids, queries.attention_mask)


def _flops(config, vision_tokens, text_tokens, answer_tokens, added):
    """Count the pass that matches an image and a text."""
    total = flops.vision_encoder(config, vision_tokens, added.get("vision"))
    total = total + flops.text_encoder(config, text_tokens, [vision_tokens[-1]], added.get("text"))
    return total + config.text_config.hidden_size * 2  # the matching head


def _encode_images_with_feature(model, pixel_values):
    images = model._encode_images(pixel_values)
    return images.hidden_states, model._image_feature(images)


def _encode_texts(model, input_ids, attention_mask):
    return model._text_feature(model._encode_text(*parts.pad_texts(model, input_ids, attention_mask)))


def _match(model, input_ids, attention_mask, image_states):
    texts = parts.pad_texts(model, input_ids, attention_mask)
    return model.itm_head(model._encode_text(*texts, *parts.layout(image_states)).first_states)


def _graphs(model, sizes: parts.Sizes) -> dict[str, parts.Graph]:
    texts = parts.texts(model, sizes)
    return {
        "vision_encoder": parts.Graph(
            "Images: their tokens' states, for the matching head, and their normalised features.",
            _encode_images_with_feature,
            parts.images(model, sizes),
            ["image_states", "image_feature"],
        ),
        "text_encoder": parts.Graph("Texts: their normalised features.", _encode_texts, texts, ["text_feature"]),
        "matching_head": parts.Graph(
            "Texts with an image each: scores of no match and match.",
            _match,
            {**texts, **parts.states(model, sizes, "image_states")},
            ["itm_score"],
        ),
    }


TASK = Task(
    name="retrieval",
    model_class=MadtpBlipForImageTextRetrieval,
    flops=_flops,
    graphs=_graphs,
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
    usage=INPUTS
    + """print(model(**inputs).itm_score.softmax(dim=-1)[0, 1].item())  # how likely they match
print(model(**inputs, use_itm_head=False).itm_score.item())  # their cosine similarity""",
    text="two dogs on a beach",
    baseline="Chance",
    tags=("image-text-retrieval", "image-text-matching"),
    predict_all=_predict_all,
    score=score_recalls,
    embeds=True,
    script="run_retrieval.py",
)
