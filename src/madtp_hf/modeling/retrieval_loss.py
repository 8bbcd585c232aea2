"""The losses of image-text retrieval: contrastive over a batch, and matching with hard negatives.

They follow BLIP (arXiv 2201.12086) and ALBEF (arXiv 2107.07651). Shapes: B samples on this process, W samples on all
processes, K keys to contrast with, E the width of the shared embedding space.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F


TEMPERATURE = 0.07


class ContrastiveKeys(NamedTuple):
    """The keys that a batch is contrasted with: features of a momentum (EMA) encoder, from this and earlier batches.

    image, text (K, E): L2-normalised features.
    image_targets (B, K): the target distribution of each image over the texts.
    text_targets (B, K): the target distribution of each text over the images.
    temperature: a scalar tensor that divides the similarities; None if the model has its own, as CLIP does.
    """

    image: torch.Tensor
    text: torch.Tensor
    image_targets: torch.Tensor
    text_targets: torch.Tensor
    temperature: torch.Tensor | None


class _GatherWithGradient(torch.autograd.Function):
    """Gathers the rows of all processes, and sums the gradients that each process has for this one's rows.

    torch's own function needs a collective that gloo lacks.
    """

    @staticmethod
    def forward(ctx, rows):
        everyone = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, rows.contiguous())
        return torch.cat(everyone)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def process_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Gather the rows of all processes in order of rank, with gradients: (B, ...) -> (W, ...).

    Each process must have the same number of rows.
    """
    return _GatherWithGradient.apply(rows) if is_distributed() else rows


def gather_padded(rows: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather padded sequences (B, L, ...) and their mask (B, L) or None from all processes.

    Returns (W, M, ...) and the mask (W, M), where M is the largest L of all processes.
    """
    if mask is None:
        mask = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
    if not is_distributed():
        return rows, mask
    longest = torch.tensor(rows.shape[1], device=rows.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    missing = int(longest) - rows.shape[1]
    rows = F.pad(rows, (0, 0) * (rows.ndim - 2) + (0, missing))
    return gather_rows(rows), gather_rows(F.pad(mask, (0, missing)).to(torch.uint8)).bool()


def same_image_targets(ids: torch.Tensor, key_ids: torch.Tensor) -> torch.Tensor:
    """Return the targets (B, K) of ids (B,) over key_ids (K,): uniform over the keys of the same image.

    There can be several such keys, because an image may have several texts.
    """
    same = (ids.unsqueeze(1) == key_ids).float()
    return same / same.sum(dim=1, keepdim=True)


def contrastive_loss(
    image_feature: torch.Tensor,
    text_feature: torch.Tensor,
    image_ids: torch.Tensor | None,
    keys: ContrastiveKeys | None,
    temperature: torch.Tensor | float = TEMPERATURE,
) -> torch.Tensor:
    """Compute the contrastive loss: the cross-entropy of the similarities (B, K), averaged over both directions.

    Args:
        image_feature, text_feature (`torch.Tensor` of shape `(B, E)`):
            L2-normalised features.
        image_ids (`torch.Tensor` of shape `(B,)`, *optional*):
            The image of each sample; needed without `keys`.
        keys (`ContrastiveKeys`, *optional*):
            What to contrast with; by default, the samples of all processes.
        temperature (`torch.Tensor` or `float`, *optional*, defaults to 0.07):
            Divides the similarities, unless the keys have a temperature.

    Returns:
        `torch.Tensor`: a scalar.
    """
    if keys is None:
        targets = same_image_targets(image_ids, gather_rows(image_ids))
        keys = ContrastiveKeys(gather_rows(image_feature), gather_rows(text_feature), targets, targets, None)
    temperature = temperature if keys.temperature is None else keys.temperature
    image_to_text = (image_feature.float() @ keys.text.float().T) / temperature
    text_to_image = (text_feature.float() @ keys.image.float().T) / temperature
    return (F.cross_entropy(image_to_text, keys.image_targets) + F.cross_entropy(text_to_image, keys.text_targets)) / 2


@torch.no_grad()
def draw_hard_negatives(
    feature: torch.Tensor, other_features: torch.Tensor, ids: torch.Tensor, other_ids: torch.Tensor, temperature
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a hard negative for each sample: a counterpart of another image, more likely the more similar it is.

    Args:
        feature (`torch.Tensor` of shape `(B, E)`):
            The samples' features.
        other_features (`torch.Tensor` of shape `(W, E)`):
            The candidates' features, in the other modality.
        ids, other_ids (`torch.Tensor` of shape `(B,)` and `(W,)`):
            The images of samples and candidates.
        temperature (`torch.Tensor` or `float`):
            Divides the similarities.

    Returns:
        The indices (N,) of the samples that have a negative, and the indices (N,) of their negatives.

    Raises:
        ValueError: if no sample has a negative, because all candidates are of one image.
    """
    likelihood = ((feature @ other_features.T).float() / temperature).softmax(dim=1) + 1e-6
    likelihood = likelihood.masked_fill(ids.unsqueeze(1) == other_ids, 0)
    has_one = (likelihood > 0).any(dim=1).nonzero().squeeze(1)
    if len(has_one) == 0:
        raise ValueError(
            f"All {len(other_ids)} samples of the batch are of one image: expected at least two different image_ids,"
            " so that each sample has a negative. Use larger batches, or drop the last, smaller one."
        )
    return has_one, torch.multinomial(likelihood[has_one], 1).squeeze(1)
