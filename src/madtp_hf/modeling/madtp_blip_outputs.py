"""What the four tasks of BLIP put out."""

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
        `task_loss`, the answer decoder's language modeling loss (the mean over tokens), and the alignment loss.
    image_embeds, last_hidden_state (`torch.Tensor` of shape `(batch_size, image_length, hidden_size)`):
        The states of the image tokens that are left, the class token first.
    hidden_states (`tuple(torch.Tensor)`, *optional*, returned with `output_hidden_states=True`):
        The states that enter the vision encoder, then those that leave each of its layers.
    logits (`torch.Tensor` of shape `(batch_size, answer_length, vocab_size)`):
        The answer decoder's scores of the next token.
    question_states (`torch.Tensor` of shape `(batch_size, question_length, hidden_size)`):
        The states of the question tokens that are left, the class token first: what the answer decoder reads.
    question_mask (`torch.BoolTensor` of shape `(batch_size, question_length)`, *optional*):
        True at its real tokens; everywhere, where nothing is padded.
    """

    logits: torch.Tensor | None = None
    question_states: torch.Tensor | None = None
    question_mask: torch.Tensor | None = None


@dataclass
class MadtpBlipForConditionalGenerationOutput(PruningOutput, BlipForConditionalGenerationModelOutput):
    r"""
    loss (`torch.Tensor`, *optional*, returned when `labels` is provided):
        The same as `task_loss`: the decoder's language modeling loss, the mean over tokens.
    logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`):
        The decoder's scores of the next token.
    image_embeds, last_hidden_state (`torch.Tensor` of shape `(batch_size, image_length, hidden_size)`):
        The states of the image tokens that are left, the class token first: what the decoder reads.
    hidden_states (`tuple(torch.Tensor)`, *optional*, returned with `output_hidden_states=True`):
        The states that enter the vision encoder, then those that leave each of its layers.
    """


@dataclass
class MadtpBlipForImageTextRetrievalOutput(PruningOutput, BlipImageTextMatchingModelOutput):
    r"""
    itm_score (`torch.Tensor` of shape `(batch_size, 2)`, or `(image_batch_size, text_batch_size)` with
        `use_itm_head=False`):
        The logits of "doesn't match" and "matches"; or the cosine similarity of each image and each text.
    loss (`torch.Tensor`, *optional*, returned with `return_loss=True`):
        `task_loss`, the sum of the contrastive and the matching loss, and the alignment loss.
    last_hidden_state (`torch.Tensor` of shape `(batch_size, image_length, hidden_size)`):
        The states of the image tokens that are left, the class token first.
    hidden_states (`tuple(torch.Tensor)`, *optional*, returned with `output_hidden_states=True`):
        The states that enter the vision encoder, then those that leave each of its layers.
    question_embeds (`torch.Tensor` of shape `(batch_size, text_length, hidden_size)`):
        The states of the text tokens that are left, the class token first.
    text_mask (`torch.BoolTensor` of shape `(batch_size, text_length)`, *optional*):
        True at its real tokens; everywhere, where nothing is padded.
    image_feature, text_feature (`torch.Tensor` of shape `(batch_size, image_text_hidden_size)`, *optional*):
        The L2-normalised features whose products the similarities are; not with the matching head alone.
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
        `task_loss`, the cross-entropy, and the alignment loss.
    logits (`torch.Tensor` of shape `(batch_size, 2)`):
        The scores of "false" and "true".
    image_embeds (`torch.Tensor` of shape `(batch_size, 2, image_length, hidden_size)`):
        The states of the image tokens that are left, the left image first, the class token first.
    hidden_states (`tuple(torch.Tensor)`, *optional*, returned with `output_hidden_states=True`):
        The states that enter the vision encoder, then those that leave each of its layers, `(2 * batch_size, length,
        hidden_size)`, the left and the right image of each sample in turn.
    text_states (`torch.Tensor` of shape `(batch_size, text_length, hidden_size)`):
        The states of the text tokens that are left, the class token first.
    """

    image_embeds: torch.Tensor | None = None
    text_states: torch.Tensor | None = None
