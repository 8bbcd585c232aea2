"""Answer ranking of BLIP's question answering: choose an answer from a fixed list."""

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from .encoder import BranchOutput
from .madtp_blip_decoder import (
    CACHE_ARGUMENT,
    cross_attention_cache,
    cross_attention_mask,
)
from .padding import left_align, text_lengths


class AnswerRanking:
    """Mixin that ranks answers, for a model with `_encode_questions` and a `text_decoder`."""

    def _decode(self, answer_ids: torch.Tensor, text: BranchOutput, cache) -> torch.Tensor:
        """Return the decoder's last hidden states (B, K, A, D) of K answers (B, K, A) to each of B questions.

        The answers to a question share its cross-attention keys and values, which `cache` holds.
        """
        batch_size, num_answers, _ = answer_ids.shape
        mask = None if text.mask is None else text.mask.repeat_interleave(num_answers, 0)
        states = self.text_decoder.bert(
            input_ids=answer_ids.flatten(0, 1),
            encoder_hidden_states=text.hidden_states,
            encoder_attention_mask=cross_attention_mask(mask),
            is_decoder=True,
            use_cache=True,
            **{CACHE_ARGUMENT: EncoderDecoderCache(DynamicCache(), cache)},
        ).last_hidden_state
        return states.unflatten(0, (batch_size, num_answers))

    @torch.no_grad()
    def rank_answers(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        answer_input_ids: torch.Tensor,
        answer_attention_mask: torch.Tensor | None = None,
        k: int = 128,
    ) -> torch.LongTensor:
        """Choose the answer to each question from a fixed list, as BLIP evaluates VQA.

        It scores the k answers with the likeliest first token as a whole and chooses the likeliest.

        Args:
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The questions.
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`):
                The images.
            answer_input_ids, answer_attention_mask (`torch.LongTensor` of shape `(num_answers, answer_length)`):
                The answers, as the tokenizer returns them. The decoder's start token replaces each first token.
            k (`int`, *optional*, defaults to 128):
                How many answers to score as a whole; all if the list has fewer.

        Returns:
            `torch.LongTensor` of shape `(batch_size,)`: the index of the chosen answer.

        Raises:
            ValueError: if k is less than 1, or an answer has no token after the start token or is too long.
        """
        if k < 1:
            raise ValueError(f"k={k}: expected the number of answers to score, at least 1.")
        text_config = self.config.text_config
        if answer_attention_mask is None:
            answer_attention_mask = answer_input_ids != text_config.pad_token_id
        lengths = text_lengths(answer_input_ids, answer_attention_mask)
        answer_ids, answer_mask = left_align(answer_input_ids, answer_attention_mask.bool())
        answer_ids, answer_mask = answer_ids[:, : max(lengths)], answer_mask[:, : max(lengths)]
        if min(lengths) < 2 or max(lengths) > text_config.max_position_embeddings:
            raise ValueError(
                f"answer_input_ids contains answers of {min(lengths)} to {max(lengths)} tokens: expected a start token"
                f" and at least one more, at most {text_config.max_position_embeddings} in total."
            )
        answer_ids = F.pad(answer_ids[:, 1:], (1, 0), value=text_config.bos_token_id)
        targets = answer_ids.masked_fill(~answer_mask, -100)

        pruning = self.start_pass()
        vision = self._encode_images(pixel_values, pruning=pruning)
        text = self._encode_questions(input_ids, attention_mask, vision, pruning)
        cache = cross_attention_cache(self.text_decoder, text.states, text.sequences)
        start = answer_ids[:1, :1].expand(text.sequences.batch_size, 1, 1)
        first_logits = self.text_decoder.cls(self._decode(start, text, cache)[:, 0, 0])
        shortlist = first_logits[:, answer_ids[:, 1]].argsort(dim=1, descending=True, stable=True)[:, :k]
        states = self._decode(answer_ids[shortlist], text, cache)
        # One question at a time: k answers' logits over the whole vocabulary are by far the largest tensor here.
        losses = torch.stack(
            [
                F.cross_entropy(
                    self.text_decoder.cls(state[:, :-1]).transpose(1, 2).float(),
                    target[:, 1:],
                    reduction="none",
                    label_smoothing=text_config.label_smoothing,
                ).sum(dim=1)
                for state, target in zip(states, targets[shortlist])
            ]
        )
        return shortlist.gather(1, losses.argmin(dim=1, keepdim=True)).squeeze(1)
