"""The losses that teach images and texts to find each other: contrastive over a batch, matching with hard negatives.

Shapes: B samples on this process, W on all of them together, K keys to contrast with, E the width of the common space.
As in BLIP (arXiv 2201.12086) after ALBEF (arXiv 2107.07651).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F


TEMPERATURE = 0.07


class ContrastiveKeys(NamedTuple):
    """The keys that a batch is contrasted with: features of a momentum (EMA) encoder, from this batch and from
    earlier ones.

    image, text (K, E): L2-normalised; image_targets, text_targets (B, K): how much of each sample's likelihood is each
    text's, and each image's; temperature: of the similarities, a scalar tensor, or None for one that is the model's
    own, as CLIP's.
    """

    image: torch.Tensor
    text: torch.Tensor
    image_targets: torch.Tensor
    text_targets: torch.Tensor
    temperature: torch.Tensor | None


class _GatherWithGradient(torch.autograd.Function):
    """Gather the rows of all processes; gradients flow back to each. torch's own function needs a collective that
    gloo lacks."""

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
    """Gather (B, ...) from all processes -> (W, ...), in order of rank and with gradients; all must have the same
    B."""
    return _GatherWithGradient.apply(rows) if is_distributed() else rows


def gather_padded(rows: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather sequences (B, L, ...) and their mask (B, L) or None from all processes -> (W, M, ...) and (W, M),
    padded to the longest M."""
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
    """Compute contrastive targets from ids (B,) and key_ids (K,) -> (B, K): a probability of 1, shared among the
    keys of the same image."""
    same = (ids.unsqueeze(1) == key_ids).float()
    return same / same.sum(dim=1, keepdim=True)


def contrastive_loss(
    image_feature: torch.Tensor,
    text_feature: torch.Tensor,
    image_ids: torch.Tensor | None,
    keys: ContrastiveKeys | None,
    temperature: torch.Tensor | float = TEMPERATURE,
) -> torch.Tensor:
    """Compute the contrastive loss: the cross-entropy of each sample's similarities (B, K), averaged over both
    directions; features (B, E), image_ids (B,).

    Without `keys`, the batches of all processes are contrasted with one another. `temperature` counts where the keys
    have none.
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
    """Draw a hard negative for each sample, feature (B, E), among other_features (W, E) of other images; more
    similar ones are more likely.

    Returns which samples have one, (N,), and which it is, (N,).
    """
    likelihood = ((feature @ other_features.T).float() / temperature).softmax(dim=1) + 1e-6
    likelihood = likelihood.masked_fill(ids.unsqueeze(1) == other_ids, 0)
    has_one = (likelihood > 0).any(dim=1).nonzero().squeeze(1)
    if len(has_one) == 0:
        raise ValueError(
            f"All {len(other_ids)} samples of the batch are of one image: expected at least two different image_ids,"
            " for a sample to"
            " be held against. Use larger batches, or drop the last, smaller one."
        )
    return has_one, torch.multinomial(likelihood[has_one], 1).squeeze(1)
