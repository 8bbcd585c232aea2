"""The training losses of BLIP's image-text retrieval: contrastive, and matching with hard negatives."""

import torch
import torch.nn.functional as F

from .padding import left_align
from .retrieval_loss import (
    TEMPERATURE,
    contrastive_loss,
    draw_hard_negatives,
    gather_padded,
    gather_rows,
    process_rank,
)
from .sequences import unpad


class RetrievalLosses:
    """Mixin with the losses of a model with `_encode_text` and an `itm_head`."""

    def _losses(self, batch, itm_score, features, image_ids, contrastive_keys) -> dict:
        """Return the contrastive loss, the matching loss with hard negatives and their sum; itm_score (B, 2).

        batch: input_ids, attention_mask, the images' `BranchOutput` and the pass's pruning.
        """
        if image_ids is None:
            image_ids = torch.arange(len(batch[0]), device=batch[0].device) + process_rank() * len(batch[0])
        contrastive = contrastive_loss(*features, image_ids, contrastive_keys)
        temperature = TEMPERATURE if contrastive_keys is None else contrastive_keys.temperature.detach()
        negatives = self._score_hard_negatives(*batch, *features, image_ids, temperature)
        labels = torch.zeros(len(itm_score) + len(negatives), dtype=torch.long, device=itm_score.device)
        labels[: len(itm_score)] = 1
        matching = F.cross_entropy(torch.cat([itm_score, negatives]), labels)
        return {"task_loss": contrastive + matching, "contrastive_loss": contrastive, "matching_loss": matching}

    def match(self, input_ids, attention_mask, image_states, image_mask=None, pruning=None) -> torch.Tensor:
        """Return matching logits (B, 2) of texts (B, L) with image states (B, M, D) and their mask (B, M)."""
        text = self._encode_text(input_ids, attention_mask, *unpad(image_states, image_mask), pruning=pruning)
        return self.itm_head(text.first_states)

    def _score_hard_negatives(
        self, input_ids, attention_mask, vision, pruning, image_feature, text_feature, image_ids, temperature
    ) -> torch.Tensor:
        """Return matching logits (up to 2 * B, 2) of texts with a wrong image and images with a wrong text each."""
        rank = process_rank()
        text_ids, text_mask = input_ids, None
        if attention_mask is not None:
            text_ids, text_mask = left_align(input_ids, attention_mask.bool())
        all_ids = gather_rows(image_ids)
        states, states_mask = gather_padded(vision.hidden_states, vision.mask)
        texts, texts_mask = gather_padded(text_ids, text_mask)
        other_images, other_texts = (gather_rows(f.detach()) for f in (image_feature, text_feature))
        of_text, wrong_image = draw_hard_negatives(text_feature, other_images, image_ids, all_ids, temperature)
        of_image, wrong_text = draw_hard_negatives(image_feature, other_texts, image_ids, all_ids, temperature)
        start = len(image_ids) * rank
        pairs_text = torch.cat([of_text + start, wrong_text])
        pairs_image = torch.cat([wrong_image, of_image + start])
        images = (states[pairs_image], states_mask[pairs_image])
        return self.match(texts[pairs_text], texts_mask[pairs_text], *images, pruning=pruning)
