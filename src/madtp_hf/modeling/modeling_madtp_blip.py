"""BLIP with MADTP token pruning: one model class for each of the four tasks.

Where transformers' BLIP has the task, parameter names and, with pruning off, outputs equal transformers'. The encoders
are in `madtp_blip_encoders.py`. The text decoder is transformers' own with another attention.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import can_return_tuple

# From a local folder, transformers 5.0 copies only what this file imports directly, hence the unused imports.
from .attention import BranchSpec  # noqa: F401
from .chunks import takes_chunks
from .configuration_madtp_blip import MadtpBlipConfig
from .configuration_pruning import MODALITIES  # noqa: F401
from .encoder import BranchOutput, EncoderOutput, as_model_output, real_tokens
from .madtp_blip_answers import AnswerRanking
from .madtp_blip_base import (
    MadtpBlipPreTrainedModel,
    images_for_texts,
    one_text_for_all,
)
from .madtp_blip_decoder import TextDecoder, cross_attention_mask, self_attention_mask
from .madtp_blip_encoders import MadtpBlipPairTextLayer, MadtpBlipTextModel, MadtpBlipVisionModel
from .madtp_blip_losses import RetrievalLosses
from .madtp_blip_outputs import (
    MadtpBlipForConditionalGenerationOutput,
    MadtpBlipForImagesAndTextClassificationOutput,
    MadtpBlipForImageTextRetrievalOutput,
    MadtpBlipForQuestionAnsweringOutput,
)
from .method_class_attention import ClassAttentionMethod  # noqa: F401
from .method_code import carry_code  # noqa: F401
from .method_evit import EvitMethod  # noqa: F401
from .method_madtp import MadtpMethod  # noqa: F401
from .method_madtp_merge import MadtpMergeMethod  # noqa: F401
from .method_random import RandomMethod  # noqa: F401
from .method_tome import TomeMethod  # noqa: F401
from .padding import check_same_number, check_same_shape, read_prompts, text_lengths
from .prepared_linear import PreparedForward  # noqa: F401
from .pruned_model import PrunedModelMixin  # noqa: F401
from .pruning_method import Decision  # noqa: F401
from .repack import repack  # noqa: F401
from .retrieval_loss import ContrastiveKeys
from .sequences import Sequences  # noqa: F401
from .texts import tokenize  # noqa: F401
from .token_pruning import AttentionStatistics  # noqa: F401
from .training_passes import runs_training_passes
from .triton_kernels import is_available  # noqa: F401
from .triton_merging import merge_similar  # noqa: F401
from .versions import VERSION  # noqa: F401


if TYPE_CHECKING:  # `as_pipeline` imports them lazily
    from .images import UnreadableImage  # noqa: F401
    from .pipeline_madtp_blip import PIPELINES  # noqa: F401


class MadtpBlipForQuestionAnswering(AnswerRanking, MadtpBlipPreTrainedModel, GenerationMixin):
    """BLIP for visual question answering that prunes image and question tokens that matter to neither modality."""

    _tied_weights_keys = {
        "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
        "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    }
    task = "vqa"
    distilled = {"logits": "tokens"}
    _task_auto_class = "AutoModelForVisualQuestionAnswering"
    _task_pipeline = ("visual-question-answering", "pipeline_madtp_blip.MadtpBlipVisualQuestionAnsweringPipeline")
    _dense_classes = (BlipForQuestionAnswering,)

    def __init__(self, config: MadtpBlipConfig):
        super().__init__(config)
        self.vision_model = MadtpBlipVisionModel(config.vision_config)
        self.text_encoder = MadtpBlipTextModel(config.text_config)
        self.text_decoder = TextDecoder(config.text_config, config.text_config.hidden_size)
        self.post_init()

    def _encode_questions(self, input_ids, attention_mask, vision, pruning, with_feature=False) -> BranchOutput:
        """Encode the questions with cross-attention to the images' `BranchOutput`."""
        input_ids, attention_mask = one_text_for_all(input_ids, attention_mask, vision.sequences.batch_size)
        images = images_for_texts(vision, input_ids, "questions")
        return self._encode_text(input_ids, attention_mask, *images, with_feature=with_feature, pruning=pruning)

    @can_return_tuple
    @runs_training_passes
    def forward(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_positions: bool = False,
        **kwargs,
    ) -> tuple | MadtpBlipForQuestionAnsweringOutput:
        r"""Compute the answer decoder's logits and, with `labels`, the training loss.

        Args:
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The questions, padded on either side.
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`):
                One image for each question, one image for several questions, or several images for one question.
            decoder_input_ids, decoder_attention_mask (`torch.LongTensor` of shape `(batch_size, answer_length)`,
                *optional*): The answer decoder's input. Defaults to `labels`, with padding in place of -100.
            labels (`torch.LongTensor` of shape `(batch_size, answer_length)`, *optional*):
                The answers, the decoder's start token first. The loss ignores tokens at -100.
            shift_labels (`torch.LongTensor` of shape `(batch_size, answer_length)`, *optional*):
                Targets already aligned with the logits, used in place of shifted `labels`, which are required too.
            output_positions (`bool`, *optional*, defaults to `False`): Whether to return `vision_positions`.

        Raises:
            ValueError: if an input has the wrong shape, a question is all padding, a question or an answer is too
            long, or neither `labels` nor `decoder_input_ids` is given.
        """
        # Not a named argument: `Trainer` would take it for a label that evaluation batches must hold.
        shift_labels = kwargs.pop("shift_labels", None)
        self._check_arguments(kwargs)
        if labels is None and decoder_input_ids is None:
            raise ValueError(
                "Neither labels nor decoder_input_ids were given: expected labels to train, decoder_input_ids to score"
                " an answer;"
                " to get an answer, call generate."
            )
        if decoder_input_ids is None:
            decoder_input_ids = labels.masked_fill(labels == -100, self.config.text_config.pad_token_id)
        longest = self.config.text_config.max_position_embeddings
        if decoder_input_ids.shape[1] > longest:
            raise ValueError(
                f"Answers of {decoder_input_ids.shape[1]} tokens: this model's decoder reads at most {longest}."
            )
        number = max(input_ids.shape[0], pixel_values.shape[0])
        if decoder_input_ids.shape[0] != number:
            raise ValueError(f"{len(decoder_input_ids)} answers for {number} questions: expected one for each.")

        with_feature, pruning = labels is not None, self.start_pass()
        vision = self._encode_images(
            pixel_values,
            with_feature,
            interpolate_pos_encoding,
            pruning,
            output_positions=output_positions,
            **self._outputs(output_hidden_states, output_attentions),
        )
        text = self._encode_questions(input_ids, attention_mask, vision, pruning, with_feature)
        question_states = text.hidden_states
        answer = self.text_decoder(
            input_ids=decoder_input_ids,
            attention_mask=self_attention_mask(decoder_attention_mask),
            encoder_hidden_states=question_states,
            encoder_attention_mask=cross_attention_mask(text.mask) if pruning.is_on else None,
            labels=labels,
            reduction="mean",
            use_cache=False,
        )
        image_embeds = vision.hidden_states
        loss = task_loss = align_loss = None
        if labels is not None:
            task_loss = self.text_decoder.loss_of(answer, shift_labels)
            align_loss = self.compute_alignment_loss(vision.feature, text.feature)
            loss = task_loss + self.config.alignment_loss_weight * align_loss
        return MadtpBlipForQuestionAnsweringOutput(
            loss=loss,
            image_embeds=image_embeds,
            last_hidden_state=image_embeds,
            hidden_states=vision.all_hidden_states,
            attentions=vision.attentions,
            logits=answer.logits,
            task_loss=task_loss,
            alignment_loss=align_loss,
            vision_tokens=vision.num_tokens,
            text_tokens=text.num_tokens,
            image_mask=real_tokens(vision),
            question_states=question_states,
            question_mask=real_tokens(text),
            vision_positions=vision.positions,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        image_embeds: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        **generate_kwargs,
    ) -> torch.LongTensor:
        """Generate an answer to each question, token by token.

        Args:
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The questions, padded on either side.
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`):
                One image for each question, one image for several questions, or several images for one question.
            image_embeds, image_mask (`torch.Tensor` of shapes `(batch_size, image_length, hidden_size)` and
                `(batch_size, image_length)`, *optional*): In place of `pixel_values`, images that were encoded before:
                `last_hidden_state` and `attention_mask` of `model.vision_model(pixel_values)`.
            generate_kwargs:
                Arguments of the decoder's `generate`: `max_new_tokens`, `num_beams`, ...

        Returns:
            `torch.LongTensor` of shape `(batch_size, answer_length)`: the answers, the start token first.
        """
        pruning = self.start_pass()
        options = {"interpolate_pos_encoding": interpolate_pos_encoding, "pruning": pruning}
        vision = self._images(pixel_values, image_embeds, image_mask, **options)
        input_ids = torch.as_tensor(input_ids, device=vision.states.device)
        text = self._encode_questions(input_ids, attention_mask, vision, pruning)
        number = text.sequences.batch_size
        start = torch.full((number, 1), self.config.text_config.bos_token_id, device=input_ids.device)
        return self._generate(start, text, masked=pruning.is_on, **generate_kwargs)


class MadtpBlipForConditionalGeneration(MadtpBlipPreTrainedModel, GenerationMixin):
    """BLIP for image captioning that prunes the least important image tokens. It has no text encoder to prune."""

    main_input_name = "pixel_values"
    _tied_weights_keys = MadtpBlipForQuestionAnswering._tied_weights_keys
    task = "captioning"
    distilled = {"logits": "tokens"}
    _task_auto_class = "AutoModelForImageTextToText"
    _task_pipeline = ("image-to-text", "pipeline_madtp_blip.MadtpBlipImageToTextPipeline")
    _dense_classes = (BlipForConditionalGeneration,)

    def __init__(self, config: MadtpBlipConfig):
        super().__init__(config)
        self.vision_model = MadtpBlipVisionModel(config.vision_config)
        self.text_decoder = TextDecoder(config.text_config, config.vision_config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.text_decoder.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.text_decoder.set_input_embeddings(value)

    @can_return_tuple
    @runs_training_passes
    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        interpolate_pos_encoding: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_positions: bool = False,
        **kwargs,
    ) -> tuple | MadtpBlipForConditionalGenerationOutput:
        r"""Compute the text decoder's logits and, with `labels`, the training loss.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`): The images.
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The decoder's input: captions, its start token first, padded on the right. Defaults to `labels`.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The captions. The loss ignores tokens at -100, such as those of a prompt.
            shift_labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Targets already aligned with the logits, used in place of shifted `labels`, which are required too.
            output_positions (`bool`, *optional*, defaults to `False`): Whether to return `vision_positions`.

        Raises:
            ValueError: if an input has the wrong shape, a caption is all padding or too long, or `input_ids` is
            missing and `labels` can't replace it.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        self._check_arguments(kwargs)
        if input_ids is None:
            if labels is None or (labels[:, 0] == -100).any():
                raise ValueError(
                    "input_ids is missing: expected the captions that the decoder reads, and labels to train (labels"
                    " alone suffice unless their first tokens are -100, as a prompt's are); to get a caption, call"
                    " generate."
                )
            input_ids = labels.masked_fill(labels == -100, self.config.text_config.pad_token_id)
        longest = self.config.text_config.max_position_embeddings
        if input_ids.shape[1] > longest:
            raise ValueError(f"Captions of {input_ids.shape[1]} tokens: this model's decoder reads at most {longest}.")
        if labels is not None:
            check_same_shape("labels", labels, input_ids)
        if attention_mask is not None:
            check_same_shape("attention_mask", attention_mask, input_ids)
            if takes_chunks(input_ids.device):  # on other devices, reading values would synchronize
                text_lengths(input_ids, attention_mask)
        vision = self._encode_images(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_positions=output_positions,
            **self._outputs(output_hidden_states, output_attentions),
        )
        image_embeds = vision.hidden_states
        if input_ids.shape[0] == 1:
            input_ids = input_ids.expand(pixel_values.shape[0], -1)
        elif pixel_values.shape[0] != 1:
            check_same_number(pixel_values.shape[0], input_ids.shape[0], "captions")
        caption = self.text_decoder(
            input_ids=input_ids,
            attention_mask=self_attention_mask(attention_mask),
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=cross_attention_mask(vision.mask),
            labels=labels,
            reduction="mean",
            logits_to_keep=logits_to_keep,
            use_cache=False,  # no later step would read every layer's keys and values of the image
        )
        loss = task_loss = align_loss = None
        if labels is not None:
            task_loss = self.text_decoder.loss_of(caption, shift_labels)
            align_loss = self.alignment(None)
            loss = task_loss + align_loss
        return MadtpBlipForConditionalGenerationOutput(
            loss=loss,
            logits=caption.logits,
            image_embeds=image_embeds,
            last_hidden_state=image_embeds,
            hidden_states=vision.all_hidden_states,
            attentions=vision.attentions,
            task_loss=task_loss,
            alignment_loss=align_loss,
            vision_tokens=vision.num_tokens,
            image_mask=real_tokens(vision),
            vision_positions=vision.positions,
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        image_embeds: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        **generate_kwargs,
    ) -> torch.LongTensor:
        """Generate a caption of each image, token by token.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`): The images.
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                A prompt to continue, as the tokenizer returns it: its first token is replaced by the decoder's start
                token, its last one, `[SEP]`, is removed. One for each image or one for all, padded on either side; or
                several for one image.
            image_embeds, image_mask (`torch.Tensor` of shapes `(batch_size, image_length, hidden_size)` and
                `(batch_size, image_length)`, *optional*): In place of `pixel_values`, images that were encoded before:
                `last_hidden_state` and `attention_mask` of `model.vision_model(pixel_values)`.
            generate_kwargs:
                Arguments of the decoder's `generate`: `max_new_tokens`, `num_beams`, ...

        Returns:
            `torch.LongTensor` of shape `(batch_size, caption_length)`: the captions, start token and prompt first.
            Shorter prompts are padded on the left.
        """
        options = {"interpolate_pos_encoding": interpolate_pos_encoding}
        vision = self._images(pixel_values, image_embeds, image_mask, **options)
        number, device = vision.sequences.batch_size, vision.states.device
        if input_ids is None:
            prompt = torch.full((number, 1), self.config.text_config.bos_token_id, device=device)
        else:
            input_ids = torch.as_tensor(input_ids, device=device)
            input_ids, attention_mask = one_text_for_all(input_ids, attention_mask, number)
            states, sequences = images_for_texts(vision, input_ids, "prompts")
            vision = vision._replace(states=states, sequences=sequences)
            prompt, attention_mask = read_prompts(input_ids, attention_mask, self.config.text_config)
        if attention_mask is not None:
            generate_kwargs["attention_mask"] = attention_mask
        return self._generate(prompt, vision, masked=True, **generate_kwargs)


class MadtpBlipForImagesAndTextClassification(MadtpBlipPreTrainedModel):
    """BLIP for visual reasoning (NLVR2), which classifies whether a sentence about two images is true.

    It prunes tokens of either image and of the sentence that matter to neither modality. transformers has no such
    BLIP. Each text layer has two cross-attentions, one for each image. Their outputs are averaged or, from layer 6 on,
    concatenated and projected by a merge layer. Parameters that transformers lacks have the original BLIP's names.
    """

    task = "nlvr2"
    distilled = {"logits": "classes"}
    _dense_classes = (BlipForImageTextRetrieval, BlipForQuestionAnswering)
    _new_in_task = ("alignment.", "merge_layer.", "cls_head.")
    _task_pipeline = (
        "images-and-text-classification",
        "pipeline_madtp_blip.MadtpBlipImagesAndTextClassificationPipeline",
    )

    def __init__(self, config: MadtpBlipConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.vision_model = MadtpBlipVisionModel(config.vision_config)
        self.text_encoder = MadtpBlipTextModel(config.text_config, MadtpBlipPairTextLayer)
        if list(config.id2label.values()) == ["LABEL_0", "LABEL_1"]:  # transformers' default names
            config.id2label, config.label2id = {0: "False", 1: "True"}, {"False": 0, "True": 1}
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.post_init()

    @classmethod
    def _from_dense_weights(cls, state_dict):
        """Copy BLIP's cross-attention to both cross-attentions of each layer, as the original does; drop its heads."""
        weights = {}
        for name, tensor in state_dict.items():
            if not name.startswith(("vision_model.", "text_encoder.")):
                continue
            if ".crossattention.self." in name:
                names = [name.replace(".self.", twin, 1) for twin in (".self0.", ".self1.")]
            elif ".crossattention.output.dense." in name:
                names = [name.replace(".dense.", twin) for twin in (".dense0.", ".dense1.")]
            else:
                names = [name]
            weights.update(dict.fromkeys(names, tensor))
        return weights

    @can_return_tuple
    @runs_training_passes
    def forward(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_positions: bool = False,
        **kwargs,
    ) -> tuple | MadtpBlipForImagesAndTextClassificationOutput:
        r"""Compute the logits of "false" and "true" and, with `labels`, the training loss.

        Args:
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The sentences, padded on either side.
            pixel_values (`torch.Tensor` of shape `(batch_size, 2, 3, image_size, image_size)`):
                The two images of each sentence, the left one first.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                1 where the sentence is true, 0 where it is false.
            output_positions (`bool`, *optional*, defaults to `False`):
                Whether to return `vision_positions`, `(2 * batch_size, length)`, left and right images alternating.

        Raises:
            ValueError: if an input has the wrong shape, a label is neither 0 nor 1, or a sentence is all padding or
            too long.
        """
        self._check_arguments(kwargs)
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}: expected (batch_size, 2, 3, height, width), the"
                " left and the right"
                " image of each sentence."
            )
        check_same_number(pixel_values.shape[0], input_ids.shape[0], "sentences")
        if labels is not None and labels.shape != input_ids.shape[:1]:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}: expected ({len(input_ids)},), one label for each sentence."
            )
        if labels is not None and ((labels != 0) & (labels != 1)).any():
            raise ValueError(
                f"labels holds {labels.unique().tolist()}: expected 1 where a sentence is true and 0 where it is"
                " false."
            )
        with_feature, pruning = labels is not None, self.start_pass()
        vision = self._encode_images(
            pixel_values.flatten(0, 1),
            with_feature,
            interpolate_pos_encoding,
            pruning,
            output_positions=output_positions,
            **self._outputs(output_hidden_states, output_attentions),
        )
        # (2 * B, ...), left and right images alternating
        left, right = (vision.sequences.every_other(vision.states, side) for side in (0, 1))
        text = self._encode_text(input_ids, attention_mask, *left, *right, with_feature=with_feature, pruning=pruning)
        logits = self.cls_head(text.first_states)

        loss = task_loss = align_loss = None
        if labels is not None:
            task_loss = F.cross_entropy(logits, labels)
            image_feature = None if vision.feature is None else vision.feature.unflatten(0, (-1, 2)).mean(dim=1)
            align_loss = self.compute_alignment_loss(image_feature, text.feature)
            loss = task_loss + self.config.alignment_loss_weight * align_loss
        return MadtpBlipForImagesAndTextClassificationOutput(
            loss=loss,
            logits=logits,
            image_embeds=vision.hidden_states.unflatten(0, (-1, 2)),
            hidden_states=vision.all_hidden_states,
            attentions=vision.attentions,
            text_states=text.hidden_states,
            task_loss=task_loss,
            alignment_loss=align_loss,
            vision_tokens=vision.num_tokens.unflatten(1, (-1, 2)).transpose(1, 2),
            text_tokens=text.num_tokens,
            image_mask=real_tokens(vision).unflatten(0, (-1, 2)),
            vision_positions=vision.positions,
        )


class MadtpBlipForImageTextRetrieval(RetrievalLosses, MadtpBlipPreTrainedModel):
    """BLIP for image-text retrieval that prunes image and text tokens that matter to neither modality.

    It has three passes: image only and text only, for features whose dot products are similarities, and text with
    cross-attention to image states, for a matching score. `return_loss=True` trains all three, with a contrastive loss
    within the batch and a matching loss with hard negatives from it. `madtp_hf.RetrievalTrainer` adds the momentum
    (EMA) encoder and the queues of its features that BLIP was trained with.
    """

    task = "retrieval"
    distilled = {"itm_score": "classes", "image_feature": "features", "text_feature": "features"}
    _task_pipeline = ("image-text-retrieval", "pipeline_madtp_blip.MadtpBlipImageTextRetrievalPipeline")
    _dense_classes = (BlipForImageTextRetrieval,)

    def __init__(self, config: MadtpBlipConfig):
        super().__init__(config)
        text_width = config.text_config.hidden_size
        self.vision_model = MadtpBlipVisionModel(config.vision_config)
        self.text_encoder = MadtpBlipTextModel(config.text_config)
        self.vision_proj = nn.Linear(config.vision_config.hidden_size, config.image_text_hidden_size)
        self.text_proj = nn.Linear(text_width, config.image_text_hidden_size)
        self.itm_head = nn.Linear(text_width, 2)
        self.post_init()

    def _image_feature(self, images: BranchOutput) -> torch.Tensor:
        return F.normalize(self.vision_proj(images.first_states), dim=-1)

    def _text_feature(self, texts: BranchOutput) -> torch.Tensor:
        return F.normalize(self.text_proj(texts.first_states), dim=-1)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        reduction: float | None = None,
        **kwargs,
    ) -> tuple | EncoderOutput:
        """Return the L2-normalised features (B, image_text_hidden_size) of images as `pooler_output`.

        pixel_values (B, 3, H, W). `reduction`: the share of FLOPs to save in this call. The output also holds the last
        hidden states and, on request, all of them and the attentions.
        """
        self._check_arguments(kwargs)
        outputs, pruning = self._outputs(output_hidden_states, output_attentions), self.start_pass(reduction)
        images = self._encode_images(pixel_values, False, interpolate_pos_encoding, pruning, **outputs)
        return as_model_output(images, self._image_feature(images), pruning.is_on)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        reduction: float | None = None,
        **kwargs,
    ) -> tuple | EncoderOutput:
        """Return the L2-normalised features (B, image_text_hidden_size) of texts as `pooler_output`.

        input_ids, attention_mask (B, L); `reduction` and the output's other fields are those of `get_image_features`.
        """
        self._check_arguments(kwargs)
        outputs, pruning = self._outputs(output_hidden_states, output_attentions), self.start_pass(reduction)
        texts = self._encode_text(input_ids, attention_mask, pruning=pruning, **outputs)
        return as_model_output(texts, self._text_feature(texts), pruning.is_on)

    @can_return_tuple
    @runs_training_passes
    def forward(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor,
        use_itm_head: bool | None = True,
        attention_mask: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        image_ids: torch.LongTensor | None = None,
        contrastive_keys: ContrastiveKeys | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_positions: bool = False,
        **kwargs,
    ) -> tuple | MadtpBlipForImageTextRetrievalOutput:
        r"""Compute matching scores or similarities of images and texts and, on request, the training loss.

        Args:
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The texts, padded on either side.
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`):
                One image for each text, one image for several texts, or several images for one text. With
                `use_itm_head=False`, each image is compared with each text.
            use_itm_head (`bool`, *optional*, defaults to `True`):
                Whether to return the matching head's logits of each text, with cross-attention to its image. If
                `False`, the similarities of all images and all texts are returned.
            return_loss (`bool`, *optional*):
                Whether to compute the training loss. Image i matches text i; all other pairs, on all processes, don't.
            image_ids (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                The id of each image, so that its other texts are not negatives. Defaults to all different.
            contrastive_keys (`ContrastiveKeys`, *optional*):
                The features to contrast with instead of the batch's. `madtp_hf.RetrievalTrainer` passes them.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                1 where a text matches its image, 0 where it doesn't. They train the matching head alone.
            output_positions (`bool`, *optional*, defaults to `False`): Whether to return `vision_positions`.

        Raises:
            ValueError: if an input has the wrong shape, a text is all padding or too long, `labels` are combined with
            another loss, or a training batch holds one image only.
        """
        # Not a named argument: `Trainer` would expect labels instead of passing `return_loss`.
        labels = kwargs.pop("labels", None)
        self._check_arguments(kwargs)
        if labels is not None and (return_loss or not use_itm_head):
            raise ValueError(
                "labels say which texts match their images: expected use_itm_head=True and no return_loss."
            )
        if image_ids is not None and image_ids.shape != input_ids.shape[:1]:
            raise ValueError(
                f"image_ids has shape {tuple(image_ids.shape)}: expected ({len(input_ids)},), one number for each"
                " image."
            )
        if return_loss:
            check_same_number(pixel_values.shape[0], input_ids.shape[0], "texts")
        elif use_itm_head:
            input_ids, attention_mask = one_text_for_all(input_ids, attention_mask, pixel_values.shape[0])
        with_feature, pruning = bool(return_loss or not use_itm_head), self.start_pass()
        vision = self._encode_images(
            pixel_values,
            with_feature,
            interpolate_pos_encoding,
            pruning,
            output_positions=output_positions,
            **self._outputs(output_hidden_states, output_attentions),
        )
        image_feature = text_feature = align_loss = None
        losses = {}
        if with_feature:
            text = self._encode_text(input_ids, attention_mask, with_feature=True, pruning=pruning)
            image_feature, text_feature = self._image_feature(vision), self._text_feature(text)
            if pixel_values.shape[0] == input_ids.shape[0]:
                align_loss = self.compute_alignment_loss(vision.feature, text.feature)
        if use_itm_head or return_loss:
            images = images_for_texts(vision, input_ids, "texts")
            text = self._encode_text(input_ids, attention_mask, *images, pruning=pruning)
            itm_score = self.itm_head(text.first_states)
        else:
            itm_score = image_feature @ text_feature.T
        if return_loss:
            features = (image_feature, text_feature)
            batch = (input_ids, attention_mask, vision, pruning)
            losses = self._losses(batch, itm_score, features, image_ids, contrastive_keys)
            losses["loss"] = losses["task_loss"] + self.config.alignment_loss_weight * align_loss
        elif labels is not None:
            matching = F.cross_entropy(itm_score, labels)
            align_loss = self.alignment(None)
            losses = {"loss": matching + align_loss, "task_loss": matching, "matching_loss": matching}
        image_embeds = vision.hidden_states
        return MadtpBlipForImageTextRetrievalOutput(
            itm_score=itm_score,
            image_embeds=image_embeds,
            last_hidden_state=image_embeds,
            hidden_states=vision.all_hidden_states,
            attentions=vision.attentions,
            question_embeds=text.hidden_states,
            alignment_loss=align_loss,
            vision_tokens=vision.num_tokens,
            text_tokens=text.num_tokens,
            image_mask=real_tokens(vision),
            vision_positions=vision.positions,
            text_mask=real_tokens(text),
            image_feature=image_feature,
            text_feature=text_feature,
            **losses,
        )


# sentence-transformers embeds by `forward` if its annotation names an output with a `last_hidden_state`, and only
# otherwise by the `get_*_features` methods. This `forward` needs an image and a text.
MadtpBlipForImageTextRetrieval.forward.__annotations__["return"] = tuple | ImageClassifierOutput


__all__ = [
    "MadtpBlipForConditionalGeneration",
    "MadtpBlipForImageTextRetrieval",
    "MadtpBlipForImagesAndTextClassification",
    "MadtpBlipForQuestionAnswering",
    "MadtpBlipPreTrainedModel",
]
