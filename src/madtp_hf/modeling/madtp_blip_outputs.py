"""Output classes of the four BLIP tasks."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.blip.modeling_blip import (
    BlipForConditionalGenerationModelOutput,
    BlipImageTextMatchingModelOutput,
    BlipTextVisionModelOutput,
)

from .pruned_model import PruningOutput


@dataclass
class MadtpBlipForQuestionAnsweringOutput(PruningOutput, BlipTextVisionModelOutput):
    r"""
    loss (`torch.Tensor`, *optional*, returned when `labels` is provided):
        The sum of `task_loss`, which is the answer decoder's language modeling loss averaged over tokens, and the
        weighted alignment loss.
    image_embeds, last_hidden_state (`torch.Tensor` of shape `(batch_size, image_length, hidden_size)`):
        The hidden states of the surviving image tokens, the class token first.
    hidden_states (`tuple(torch.Tensor)`, *optional*, returned with `output_hidden_states=True`):
        The hidden states at the input of the vision encoder and at the output of each of its layers.
    logits (`torch.Tensor` of shape `(batch_size, answer_length, vocab_size)`):
        The answer decoder's next-token logits.
    question_states (`torch.Tensor` of shape `(batch_size, question_length, hidden_size)`):
        The hidden states of the surviving question tokens, the class token first. The answer decoder attends to them.
    question_mask (`torch.BoolTensor` of shape `(batch_size, question_length)`, *optional*):
        True at the real tokens of `question_states`; all True without padding.
    """

    logits: torch.Tensor | None = None
    question_states: torch.Tensor | None = None
    question_mask: torch.Tensor | None = None


@dataclass
class MadtpBlipForConditionalGenerationOutput(PruningOutput, BlipForConditionalGenerationModelOutput):
    r"""
    loss (`torch.Tensor`, *optional*, returned when `labels` is provided):
        The same as `task_loss`: the decoder's language modeling loss averaged over tokens.
    logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`):
        The decoder's next-token logits.
    image_embeds, last_hidden_state (`torch.Tensor` of shape `(batch_size, image_length, hidden_size)`):
        The hidden states of the surviving image tokens, the class token first. The decoder attends to them.
    hidden_states (`tuple(torch.Tensor)`, *optional*, returned with `output_hidden_states=True`):
        The hidden states at the input of the vision encoder and at the output of each of its layers.
    """


@dataclass
class MadtpBlipForImageTextRetrievalOutput(PruningOutput, BlipImageTextMatchingModelOutput):
    r"""
    itm_score (`torch.Tensor` of shape `(batch_size, 2)`, or `(image_batch_size, text_batch_size)` with
        `use_itm_head=False`):
        The logits of "doesn't match" and "matches", or the cosine similarities of all images and all texts.
    loss (`torch.Tensor`, *optional*, returned with `return_loss=True`):
        The sum of `task_loss`, which is the contrastive plus the matching loss, and the weighted alignment loss.
    last_hidden_state (`torch.Tensor` of shape `(batch_size, image_length, hidden_size)`):
        The hidden states of the surviving image tokens, the class token first.
    hidden_states (`tuple(torch.Tensor)`, *optional*, returned with `output_hidden_states=True`):
        The hidden states at the input of the vision encoder and at the output of each of its layers.
    question_embeds (`torch.Tensor` of shape `(batch_size, text_length, hidden_size)`):
        The hidden states of the surviving text tokens, the class token first.
    text_mask (`torch.BoolTensor` of shape `(batch_size, text_length)`, *optional*):
        True at the real tokens of `question_embeds`; all True without padding.
    image_feature, text_feature (`torch.Tensor` of shape `(batch_size, image_text_hidden_size)`, *optional*):
        The L2-normalised features, whose dot products are the similarities. `None` with the matching head alone.
    contrastive_loss, matching_loss (`torch.Tensor`, *optional*, returned with `return_loss=True`):
        The two parts of `task_loss`.
    """

    text_mask: torch.Tensor | None = None
    image_feature: torch.Tensor | None = None
    text_feature: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    matching_loss: torch.Tensor | None = None


@dataclass
class MadtpBlipForImagesAndTextClassificationOutput(PruningOutput, SequenceClassifierOutput):
    r"""
    loss (`torch.Tensor`, *optional*, returned when `labels` is provided):
        The sum of `task_loss`, which is the cross-entropy, and the weighted alignment loss.
    logits (`torch.Tensor` of shape `(batch_size, 2)`):
        The logits of "false" and "true".
    image_embeds (`torch.Tensor` of shape `(batch_size, 2, image_length, hidden_size)`):
        The hidden states of the surviving tokens of the left and the right image, the class token first.
    hidden_states (`tuple(torch.Tensor)`, *optional*, returned with `output_hidden_states=True`):
        The hidden states at the input of the vision encoder and at the output of each of its layers, `(2 *
        batch_size, length, hidden_size)`, the left and the right image of each sample alternating.
    text_states (`torch.Tensor` of shape `(batch_size, text_length, hidden_size)`):
        The hidden states of the surviving text tokens, the class token first.
    """

    image_embeds: torch.Tensor | None = None
    text_states: torch.Tensor | None = None
