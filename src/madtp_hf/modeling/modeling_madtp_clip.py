"""CLIP with MADTP token pruning.

Parameter names equal those of transformers' CLIP and, with pruning off, so do the outputs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import CLIPModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import (
    CLIPMLP,
    CLIPOutput,
    CLIPPreTrainedModel,
    image_text_contrastive_loss,
)
from transformers.utils import can_return_tuple

# From a local folder, transformers 5.0 copies only what this file imports directly, hence the unused imports.
from .attention import CLASS_TOKEN_FIRST
from .chunks import Chunking  # noqa: F401
from .configuration_madtp_clip import MadtpClipConfig
from .configuration_pruning import MODALITIES  # noqa: F401
from .encoder import as_model_output, real_tokens
from .madtp_clip_towers import TEXT_SPEC, MadtpClipTextModel, MadtpClipVisionModel
from .method_class_attention import ClassAttentionMethod  # noqa: F401
from .method_code import carry_code  # noqa: F401
from .method_evit import EvitMethod  # noqa: F401
from .method_madtp import MadtpMethod  # noqa: F401
from .method_madtp_merge import MadtpMergeMethod  # noqa: F401
from .method_random import RandomMethod  # noqa: F401
from .method_tome import TomeMethod  # noqa: F401
from .padding import check_same_number
from .prepared_linear import PreparedForward  # noqa: F401
from .pruned_model import PrunedModelMixin, PruningOutput
from .pruning_method import PruningMethod  # noqa: F401
from .repack import repack  # noqa: F401
from .retrieval_loss import ContrastiveKeys, contrastive_loss
from .sequences import Sequences  # noqa: F401
from .token_pruning import AttentionStatistics  # noqa: F401
from .training_passes import runs_training_passes
from .triton_kernels import is_available  # noqa: F401
from .triton_merging import merge_similar  # noqa: F401
from .versions import VERSION  # noqa: F401


if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class MadtpClipOutput(PruningOutput, CLIPOutput):
    r"""
    loss (`torch.Tensor`, *optional*, returned with `return_loss=True`):
        The sum of `task_loss`, which is CLIP's contrastive loss, and the weighted alignment loss.
    logits_per_image (`torch.Tensor` of shape `(image_batch_size, text_batch_size)`), logits_per_text (its transpose):
        The scaled cosine similarities of all images and all texts.
    text_embeds, image_embeds (`torch.Tensor` of shape `(batch_size, projection_dim)`): L2-normalised features.
    text_model_output, vision_model_output (`BaseModelOutputWithPooling`):
        What `get_text_features` and `get_image_features` return, with the hidden states of the surviving tokens.
    image_mask: True at the real tokens of `vision_model_output.last_hidden_state`.
    """


class MadtpClipModel(PrunedModelMixin, CLIPPreTrainedModel):
    """CLIP that prunes image and text tokens that matter to neither modality."""

    config: MadtpClipConfig
    config_class = MadtpClipConfig
    base_model_prefix = "madtp_clip"
    model_tags = ["clip", "madtp", "token-pruning"]  # in a model card's metadata
    task = "clip"
    distilled = {"image_embeds": "features", "text_embeds": "features"}  # whose comparison needs no other sample
    _dense_classes = (CLIPModel,)
    _from_dense_name = "from_clip"
    _task_auto_class = "AutoModelForZeroShotImageClassification"
    branch_specs = {"vision": CLASS_TOKEN_FIRST, "text": TEXT_SPEC}
    min_kept = 2
    has_layer_projections = True
    _fused_activations = {CLIPMLP: ("fc1", "activation_fn")}
    _no_split_modules = ["MadtpClipLayer", "CLIPTextEmbeddings", "CLIPVisionEmbeddings"]
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_record_outputs = {}

    def __init__(self, config: MadtpClipConfig):
        super().__init__(config)
        self.text_model = MadtpClipTextModel(config.text_config)
        self.vision_model = MadtpClipVisionModel(config.vision_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MadtpClipModel):
            for projection in (module.visual_projection, module.text_projection):
                init.normal_(projection.weight, std=projection.in_features**-0.5 * self.config.initializer_factor)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)

    @classmethod
    def from_clip(cls, source: PreTrainedModel | str | Path, **config_overrides) -> "Self":
        """Create a model of this class from transformers' CLIP. Only alignment parameters are new.

        Args:
            source (`CLIPModel` or `str`):
                A CLIP model, whose weights are copied, a path or Hub id to load it from, or a model of this class.
            config_overrides:
                Fields of [`MadtpClipConfig`] to set. With a path or Hub id, also arguments of `from_pretrained`.

        Raises:
            TypeError: if the source is a model other than CLIP, or an override is neither a field nor such an
            argument.
        """
        return cls.from_dense(source, **config_overrides)

    def get_input_embeddings(self):
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value):
        self.text_model.embeddings.token_embedding = value

    def _encode_images(
        self, pixel_values, with_feature=False, interpolate_pos_encoding=False, pruning=None, **outputs
    ):
        """Encode pixel_values (B, 3, H, W); `outputs` are further arguments of `run_layers`."""
        pruning = pruning or self.start_pass()
        outputs["method"] = self.make_method(pruning, "vision", with_feature)
        return pruning.encode("vision", self.vision_model, pixel_values, interpolate_pos_encoding, **outputs)

    def _encode_text(
        self, input_ids, attention_mask=None, position_ids=None, with_feature=False, pruning=None, **outputs
    ):
        """Encode input_ids (B, L) into a `BranchOutput`."""
        pruning = pruning or self.start_pass()
        layout, puts_back = pruning.text_layout, False
        if layout == "dense" and attention_mask is not None and not torch.compiler.is_compiling():
            # With a mask, the states of padding are not needed, unless the caller asks for those of all layers.
            puts_back = all(x is None or x is False for x in outputs.values())
            layout = "varlen" if puts_back else layout
        method = self.make_method(pruning, "text", with_feature)
        options = {"layout": layout, "puts_back": puts_back, "method": method, **outputs}
        return pruning.encode("text", self.text_model, input_ids, attention_mask, position_ids, **options)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        reduction: float | None = None,
        **kwargs,
    ) -> tuple | BaseModelOutputWithPooling:
        """Return unnormalised text features (B, projection_dim) as `pooler_output`, and the surviving hidden states.

        input_ids, attention_mask, position_ids (B, L). `reduction`: the share of FLOPs to save in this call. Without
        pruning, outputs equal `CLIPModel`'s, but for zeros at the padding of a mask.
        """
        self._check_arguments(kwargs)
        outputs, pruning = self._outputs(output_hidden_states, output_attentions), self.start_pass(reduction)
        texts = self._encode_text(input_ids, attention_mask, position_ids, pruning=pruning, **outputs)
        return as_model_output(texts, self.text_projection(texts.pooled), pruning.is_on)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        reduction: float | None = None,
        **kwargs,
    ) -> tuple | BaseModelOutputWithPooling:
        """Return unnormalised image features (B, projection_dim) as `pooler_output`, and the surviving hidden states.

        pixel_values (B, 3, H, W). `reduction`: the share of FLOPs to save in this call. Without pruning, outputs equal
        `CLIPModel`'s.
        """
        self._check_arguments(kwargs)
        outputs, pruning = self._outputs(output_hidden_states, output_attentions), self.start_pass(reduction)
        images = self._encode_images(pixel_values, False, interpolate_pos_encoding, pruning, **outputs)
        return as_model_output(images, self.visual_projection(images.pooled), pruning.is_on)

    @can_return_tuple
    @runs_training_passes
    def forward(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        image_ids: torch.LongTensor | None = None,
        contrastive_keys: ContrastiveKeys | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_positions: bool = False,
        **kwargs,
    ) -> tuple | MadtpClipOutput:
        r"""Compute the similarities of all images and texts and, with `return_loss`, the training loss.

        Args:
            input_ids, attention_mask (`torch.LongTensor` of shape `(text_batch_size, sequence_length)`):
                The texts. All tokens after the end of text are padding, with or without a mask.
            pixel_values (`torch.Tensor` of shape `(image_batch_size, 3, image_size, image_size)`): The images.
            position_ids (`torch.LongTensor` of shape `(text_batch_size, sequence_length)`, *optional*):
                The positions of the tokens. Defaults to 0, 1, 2, ...
            return_loss (`bool`, *optional*):
                Whether to compute the training loss. Image i matches text i; all other pairs of the batch don't.
            image_ids (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                The id of each image, so that its other texts are not negatives; contrasts batches of all processes.
            contrastive_keys (`ContrastiveKeys`, *optional*):
                The features to contrast with instead of the batch's. `madtp_hf.RetrievalTrainer` passes them.
            output_positions (`bool`, *optional*): Whether to return `vision_positions`.
        """
        self._check_arguments(kwargs)
        with_feature = bool(return_loss)
        if with_feature:
            check_same_number(len(pixel_values), len(input_ids), "texts")
        outputs, pruning = self._outputs(output_hidden_states, output_attentions), self.start_pass()
        images = self._encode_images(
            pixel_values,
            with_feature,
            interpolate_pos_encoding,
            pruning,
            output_positions=output_positions,
            **outputs,
        )
        texts = self._encode_text(input_ids, attention_mask, position_ids, with_feature, pruning, **outputs)
        features = self.visual_projection(images.pooled), self.text_projection(texts.pooled)
        image_embeds, text_embeds = (x / x.norm(dim=-1, keepdim=True) for x in features)
        logits_per_text = text_embeds @ image_embeds.T.to(text_embeds.device)
        logits_per_text = logits_per_text * self.logit_scale.exp().to(text_embeds.device)
        loss = task_loss = align_loss = None
        if return_loss:
            if image_ids is None and contrastive_keys is None:
                task_loss = image_text_contrastive_loss(logits_per_text)
            else:
                temperature = (-self.logit_scale).exp()
                task_loss = contrastive_loss(image_embeds, text_embeds, image_ids, contrastive_keys, temperature)
            align_loss = self.compute_alignment_loss(images.feature, texts.feature)
            loss = task_loss + self.config.alignment_loss_weight * align_loss
        return MadtpClipOutput(
            loss=loss,
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=as_model_output(texts, features[1], pruning.is_on),
            vision_model_output=as_model_output(images, features[0], pruning.is_on),
            task_loss=task_loss,
            alignment_loss=align_loss,
            vision_tokens=images.num_tokens,
            text_tokens=texts.num_tokens,
            image_mask=real_tokens(images),
            vision_positions=images.positions,
        )


__all__ = ["MadtpClipModel", "MadtpClipOutput"]
