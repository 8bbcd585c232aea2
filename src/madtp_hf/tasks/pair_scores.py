"""Image-text retrieval: score all images against all captions, by features (CLIP) or in two stages (BLIP)."""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..budgets.evaluation import budget_rows
from ..metrics import load_metric
from ..modeling.retrieval_loss import is_distributed, process_rank


NOT_LISTED = -100.0  # the score of a pair outside the shortlists, below every other score


@torch.no_grad()
def encode_images(model, pixel_batches) -> tuple[torch.Tensor, list[torch.Tensor]]:
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
    image_features, states = encode_images(model, pixel_batches)
    text_features = torch.cat(
        [
            model.get_text_features(ids, mask)
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
    texts = zip(input_ids.split(batch_size), attention_mask.split(batch_size))
    texts = normalised(model.get_text_features(ids.to(model.device), mask.to(model.device)) for ids, mask in texts)
    similarity = (images @ texts.T).cpu()
    return similarity, similarity.T


class CaptionedImages:
    """Images and all of their captions, encoded for retrieval in both directions.

    Args:
        rows (`datasets.Dataset`): with the columns `image` and `captions`, a list of strings.
        processor: the model's processor, of images and texts.
        max_length (`int`, *optional*): truncate captions to this many tokens.
        batch_size (`int`, *optional*, defaults to 64): images per batch.

    Attributes: `texts`, all captions; `input_ids` and `attention_mask`, the tokenized captions; `pixel_batches`, the
    preprocessed images.
    """

    def __init__(self, rows, processor, max_length: int | None = None, batch_size: int = 64):
        self.texts = [caption for captions in rows["captions"] for caption in captions]
        belongs = [index for index, captions in enumerate(rows["captions"]) for _ in captions]
        self._own = [[] for _ in range(len(rows))]
        for text, image in enumerate(belongs):
            self._own[image].append(text)
        cuts = max_length is not None
        encoded = processor.tokenizer(
            self.texts, padding=True, truncation=cuts, max_length=max_length, return_tensors="pt"
        )
        self.input_ids, self.attention_mask = encoded.input_ids, encoded.attention_mask

        def to_pixels(rows):
            images = [row["image"].convert("RGB") for row in rows]
            return processor.image_processor(images, return_tensors="pt").pixel_values

        self.pixel_batches = DataLoader(rows.select_columns("image"), batch_size=batch_size, collate_fn=to_pixels)

    def __len__(self) -> int:
        return len(self._own)

    def recalls(self, image_to_text: torch.Tensor, text_to_image: torch.Tensor) -> dict[str, float]:
        """Compute recall at 1, 5 and 10 in both directions, and their mean `"mean %"`.

        image_to_text: scores (images, texts); text_to_image: scores (texts, images).
        """
        recalls = load_metric("retrieval_recall").compute(
            predictions=image_to_text.numpy(), references=self._own, text_to_image=text_to_image.numpy()
        )
        return {f"{name.replace('_recall', '')} %": value for name, value in recalls.items()}

    def by_chance(self) -> dict[str, float]:
        """Return the `recalls` of random scores."""
        chance = torch.rand(len(self._own), len(self.texts), generator=torch.Generator().manual_seed(0))
        return self.recalls(chance, chance.T)


def retrieval_rows(results: list[tuple]) -> list[dict]:
    """Build a results table's rows from each budget's (`BudgetResult`, recalls, seconds of scoring), dense first."""
    costs, recalls, seconds = zip(*results)
    shown = ("image_to_text@1 %", "text_to_image@1 %", "mean %")
    return budget_rows(costs, [{name: found[name] for name in shown} for found in recalls], seconds)
