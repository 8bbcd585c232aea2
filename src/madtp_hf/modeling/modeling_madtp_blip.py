"""BLIP with MADTP token pruning.

The two encoders follow transformers' BLIP layer by layer, and their parameters have its names; what a pruned layer does to its
tokens is in `token_pruning.py`. Text decoders are transformers' own.
"""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BlipForQuestionAnswering, PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.models.blip.modeling_blip import BlipEncoderLayer, BlipPreTrainedModel, BlipVisionEmbeddings
from transformers.models.blip.modeling_blip_text import (
    BlipTextEmbeddings,
    BlipTextLayer,
    BlipTextLMHeadModel,
    BlipTextSelfAttention,
)
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_madtp_blip import MadtpBlipConfig
from .token_pruning import (
    AttentionScores,
    alignment_feature,
    alignment_loss,
    alignment_scores,
    prune_tokens,
    scored_attention,
)


@dataclass
class MadtpBlipForQuestionAnsweringOutput(ModelOutput):
    r"""
    loss (`torch.Tensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
        `task_loss`, and with pruning on `alignment_loss_weight * alignment_loss` on top of it.
    image_embeds (`torch.Tensor` of shape `(batch_size, image_length, hidden_size)`):
        The states of the image tokens that are left, the class token first; `last_hidden_state` is the same.
    hidden_states (`tuple(torch.Tensor)`, *optional*, returned with `output_hidden_states=True`):
        The states that enter the vision encoder, then those that leave each of its layers.
    logits (`torch.Tensor` of shape `(batch_size, answer_length, vocab_size)`):
        The answer decoder's scores of the next token.
    task_loss (`torch.Tensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
        The answer decoder's language modeling loss, the mean over tokens.
    alignment_loss (`torch.Tensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
        How far image and text are from gathering the same at the alignment tokens; 0 with pruning off.
    vision_tokens, text_tokens (`torch.LongTensor` of shape `(num_layers + 1, batch_size)`):
        The number of tokens that enter the encoder and that each of its layers leaves, class token included, padding not.
    image_mask, question_mask (`torch.BoolTensor` of shape `(batch_size, length)`, *optional*):
        True at the real tokens of `image_embeds` and `question_states`; `None` where there is no padding.
    question_states (`torch.Tensor` of shape `(batch_size, question_length, hidden_size)`):
        The states of the question tokens that are left, the class token first: what the answer decoder reads.
    vision_positions (`tuple(torch.LongTensor)`, *optional*, returned with `output_positions=True`):
        For what enters the vision encoder and what each layer leaves, `(batch_size, length)`: where each token was in the input, 0 the
        class token and n the n-th patch; -1 for merged tokens and padding.
    """

    loss: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    logits: torch.Tensor | None = None
    task_loss: torch.Tensor | None = None
    alignment_loss: torch.Tensor | None = None
    vision_tokens: torch.Tensor | None = None
    text_tokens: torch.Tensor | None = None
    image_mask: torch.Tensor | None = None
    question_states: torch.Tensor | None = None
    question_mask: torch.Tensor | None = None
    vision_positions: tuple[torch.Tensor, ...] | None = None


class BranchPruning(NamedTuple):
    """What the layers of one branch need to know to prune. A temperature of 0 leaves the tokens alone, but aligns them."""

    alignment_tokens: torch.Tensor
    projection: nn.Module | None
    temperature: float
    granularity: str
    with_feature: bool


# What a layer leaves: hidden_states (B, L, D), mask (B, L) or None, feature (B, T, D) or None, and source (B, L) or None, where its tokens
# come from. A plain tuple, which is what gradient checkpointing passes through.
LayerOutput = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class BranchOutput(NamedTuple):
    """hidden_states (B, L, D), mask (B, L) or None, feature (B, T, D) or None, num_tokens (layers + 1, B) int64.

    On request, all_hidden_states, what enters the branch and leaves each layer, and positions, layers + 1 tensors (B, L) that say where in
    the branch's input each token was, -1 for merged ones and padding.
    """

    hidden_states: torch.Tensor
    mask: torch.Tensor | None
    feature: torch.Tensor | None
    num_tokens: torch.Tensor
    all_hidden_states: tuple[torch.Tensor, ...] | None
    positions: tuple[torch.Tensor, ...] | None


def split_heads(states: torch.Tensor, num_heads: int) -> torch.Tensor:
    return states.unflatten(-1, (num_heads, -1)).transpose(-2, -3)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scored: bool = False,
) -> tuple[torch.Tensor, AttentionScores | None]:
    """Attention of (B, H, L, d) to (B, H, M, d) with mask (B, M) -> (B, L, H * d), and its scores where they are asked for."""
    if scored:
        context, scores = scored_attention(query, key, value, mask, dropout)
    else:
        mask = None if mask is None else mask[:, None, None, :]
        context = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=is_causal)
        scores = None
    return context.transpose(1, 2).flatten(2), scores


def align(hidden_states: torch.Tensor, mask: torch.Tensor | None, pruning: BranchPruning):
    """A layer's alignment scores and, where the loss is wanted, its alignment feature, from the layer's input."""
    tokens = hidden_states[:, 1:]
    if pruning.projection is not None:
        tokens = pruning.projection(tokens)
    scores = alignment_scores(tokens, pruning.alignment_tokens)
    if not pruning.with_feature:
        return scores, None
    return scores, alignment_feature(scores, tokens, None if mask is None else mask[:, 1:])


class MadtpBlipVisionLayer(BlipEncoderLayer):
    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        pruning: BranchPruning | None = None,
    ) -> LayerOutput:
        scores, feature = (None, None) if pruning is None else align(hidden_states, mask, pruning)
        prunes = pruning is not None and pruning.temperature > 0
        source = None

        attention = self.self_attn
        query, key, value = split_heads(attention.qkv(self.layer_norm1(hidden_states)), 3 * attention.num_heads).chunk(
            3, 1
        )
        dropout = attention.dropout.p if self.training else 0.0
        context, attention_scores = attend(query, key, value, mask, dropout, scored=prunes)
        hidden_states = hidden_states + attention.projection(context)

        if prunes:
            hidden_states, mask, source = prune_tokens(
                hidden_states, attention_scores, scores, pruning.temperature, pruning.granularity, mask
            )
        hidden_states = hidden_states + self.mlp(self.layer_norm2(hidden_states))
        return hidden_states, mask, feature, source


def text_attention(
    attention: nn.Module,
    hidden_states: torch.Tensor,
    context_states: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scored: bool = False,
) -> tuple[torch.Tensor, AttentionScores | None]:
    """A `BlipTextAttention` of hidden_states (B, L, D) to context_states (B, M, E) with mask (B, M), with its residual and norm."""
    inner = attention.self
    query, key, value = (
        split_heads(linear(states), inner.num_attention_heads)
        for linear, states in (
            (inner.query, hidden_states),
            (inner.key, context_states),
            (inner.value, context_states),
        )
    )
    dropout = inner.dropout.p if attention.training else 0.0
    context, scores = attend(query, key, value, mask, dropout, is_causal, scored)
    return attention.output(context, hidden_states), scores


class MadtpBlipTextLayer(BlipTextLayer):
    def forward(
        self,
        hidden_states: torch.Tensor,
        image_states: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        pruning: BranchPruning | None = None,
    ) -> LayerOutput:
        scores, feature = (None, None) if pruning is None else align(hidden_states, mask, pruning)
        prunes = pruning is not None and pruning.temperature > 0
        source = None

        hidden_states, attention_scores = text_attention(
            self.attention, hidden_states, hidden_states, mask, scored=prunes
        )
        if prunes:
            hidden_states, mask, source = prune_tokens(
                hidden_states, attention_scores, scores, pruning.temperature, pruning.granularity, mask
            )
        if image_states is not None:
            hidden_states, _ = text_attention(self.crossattention, hidden_states, image_states, image_mask)
        return self.feed_forward_chunk(hidden_states), mask, feature, source


def run_layers(
    layers: nn.ModuleList,
    hidden_states: torch.Tensor,
    *context: torch.Tensor | None,
    mask: torch.Tensor | None = None,
    pruning: BranchPruning | None = None,
    output_hidden_states: bool = False,
    output_positions: bool = False,
) -> BranchOutput:
    """Both encoders: layer after layer on the tokens that the one before has left; `context` is what each layer looks at besides."""

    def count(hidden_states, mask):
        if mask is not None:
            return mask.sum(dim=1)
        return torch.full(hidden_states.shape[:1], hidden_states.shape[1], device=hidden_states.device)

    num_tokens = [count(hidden_states, mask)]
    all_hidden_states = [hidden_states]
    positions = [torch.arange(hidden_states.shape[1], device=hidden_states.device).expand(hidden_states.shape[:2])]
    feature = None
    for layer in layers:
        hidden_states, mask, layer_feature, source = layer(hidden_states, *context, mask=mask, pruning=pruning)
        if layer_feature is not None:
            feature = layer_feature if feature is None else feature + layer_feature
        num_tokens.append(count(hidden_states, mask))
        if output_hidden_states:
            all_hidden_states.append(hidden_states)
        if output_positions:
            last = positions[-1]
            positions.append(last if source is None else last.gather(1, source.clamp(min=0)).where(source >= 0, -1))
    return BranchOutput(
        hidden_states,
        mask,
        feature,
        torch.stack(num_tokens),
        tuple(all_hidden_states) if output_hidden_states else None,
        tuple(positions) if output_positions else None,
    )


class MadtpBlipVisionEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([MadtpBlipVisionLayer(config) for _ in range(config.num_hidden_layers)])


class MadtpBlipVisionModel(nn.Module):
    """The image branch: pixel_values (B, 3, H, W) -> `BranchOutput`."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = BlipVisionEmbeddings(config)
        self.encoder = MadtpBlipVisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        pixel_values: torch.Tensor,
        pruning: BranchPruning | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
        output_positions: bool = False,
    ) -> BranchOutput:
        size = self.embeddings.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}: expected (batch_size, 3, height, width), as the model's"
                " image processor makes it."
            )
        if not interpolate_pos_encoding and tuple(pixel_values.shape[2:]) != (size, size):
            height, width = pixel_values.shape[2:]
            raise ValueError(
                f"pixel_values are images of {height} x {width} pixels: this model takes {size} x {size}. Resize them with its"
                " image processor, or pass interpolate_pos_encoding=True."
            )
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        output = run_layers(
            self.encoder.layers,
            hidden_states,
            pruning=pruning,
            output_hidden_states=output_hidden_states,
            output_positions=output_positions,
        )
        return output._replace(hidden_states=self.post_layernorm(output.hidden_states))


class MadtpBlipTextEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = nn.ModuleList([MadtpBlipTextLayer(config, index) for index in range(config.num_hidden_layers)])


class MadtpBlipTextModel(nn.Module):
    """The text branch: input_ids (B, L), with padding behind the text, and the image's states -> `BranchOutput`."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = BlipTextEmbeddings(config)
        self.encoder = MadtpBlipTextEncoder(config)

    def forward(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        pruning: BranchPruning | None = None,
        image_states: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
    ) -> BranchOutput:
        longest = self.embeddings.position_embeddings.num_embeddings
        if input_ids.shape[1] > longest:
            raise ValueError(
                f"input_ids holds a text of {input_ids.shape[1]} tokens: this model reads at most {longest}. Tokenize with"
                f" truncation=True, max_length={longest}."
            )
        hidden_states = self.embeddings(input_ids)
        return run_layers(self.encoder.layer, hidden_states, image_states, image_mask, mask=mask, pruning=pruning)


class MaskedCrossAttention(BlipTextSelfAttention):
    """The decoder's cross-attention, minding the mask: transformers' own loses it on the way here, and reads padding as well."""

    def forward(
        self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, **kwargs
    ):
        if encoder_attention_mask is None:
            encoder_attention_mask = attention_mask
        return super().forward(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **kwargs,
        )


def build_text_decoder(config) -> BlipTextLMHeadModel:
    """The answer decoder, transformers' own but for the mask; it reads states of the text branch's width."""
    config = copy.deepcopy(config)
    config.encoder_hidden_size = config.hidden_size
    decoder = BlipTextLMHeadModel(config)
    for index, layer in enumerate(decoder.bert.encoder.layer):
        layer.crossattention.self = MaskedCrossAttention(config, is_cross_attention=True, layer_idx=index)
    return decoder


class MadtpBlipAlignment(nn.Module):
    """The alignment tokens (T, D) that both branches share, and the maps to their width for branches of another."""

    def __init__(self, config: MadtpBlipConfig):
        super().__init__()
        width = config.alignment_dim or config.text_config.hidden_size

        def projection(branch_width):
            return None if branch_width == width else nn.Linear(branch_width, width, bias=False)

        self.tokens = nn.Parameter(torch.empty(config.num_alignment_tokens, width))
        self.vision_projection = projection(config.vision_config.hidden_size)
        self.text_projection = projection(config.text_config.hidden_size)


def left_align(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cut: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Move padding, wherever it is, behind the text, and `cut` what no text of the batch needs.

    input_ids, attention_mask (B, L) -> input_ids (B, M), mask (B, M) bool or None where nothing is padded. So neither the side nor the
    length of padding matters to what follows.
    """
    if attention_mask is None:
        return input_ids, None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)}: expected the same."
        )
    real = attention_mask.bool()
    lengths = real.sum(dim=1)
    shortest, longest = torch.stack(lengths.aminmax()).tolist()
    if shortest == 0:
        rows = (lengths == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"attention_mask is 0 everywhere in row {rows}: expected at least one real token in each text."
        )
    width = longest if cut else input_ids.shape[1]
    order = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    input_ids = input_ids.gather(1, order)
    if shortest == width:
        return input_ids, None
    return input_ids, torch.arange(width, device=input_ids.device) < lengths.unsqueeze(1)


class MadtpBlipPreTrainedModel(BlipPreTrainedModel):
    """What the four tasks share: the alignment tokens, the switch for pruning, the way in from transformers' BLIP."""

    config: MadtpBlipConfig
    config_class = MadtpBlipConfig
    base_model_prefix = "madtp_blip"
    _no_split_modules = ["MadtpBlipVisionLayer", "MadtpBlipTextLayer", "BlipTextLayer", "BlipTextEmbeddings"]
    # `save_pretrained` brings the code along for `AutoModel`; each task adds its own auto class and pipeline.
    _auto_class = "AutoModel"
    task = None  # as `madtp_hf.count_flops` names it
    _task_auto_class = None
    _task_pipeline = None
    _blip_class = None
    # The loss is a mean over this batch; `Trainer` is to divide it by its accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: MadtpBlipConfig):
        super().__init__(config)
        config.check_pruning()
        name = f"modeling_madtp_blip.{type(self).__name__}"
        config.auto_map = {
            "AutoConfig": "configuration_madtp_blip.MadtpBlipConfig",
            "AutoModel": name,
            self._task_auto_class: name,
        }
        if self._task_pipeline is not None:
            task, pipeline = self._task_pipeline
            config.custom_pipelines = {
                task: {"impl": pipeline, "pt": [self._task_auto_class], "type": "multimodal", "default": {}}
            }
        self.alignment = MadtpBlipAlignment(config)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MadtpBlipAlignment):
            # Norms from large to a hundredth of that. At a temperature, alignment tokens of small norm look at all tokens alike and those
            # of large norm at their likeliest alone: graded norms let the threshold, the least of what they see, move smoothly from
            # the lowest importance to the mean, so that an untrained model reaches small reductions and large ones.
            scale = torch.logspace(0, -2, module.tokens.shape[0], device=module.tokens.device)
            init.copy_(module.tokens, torch.randn_like(module.tokens) * scale.unsqueeze(1))
        elif isinstance(module, BlipTextEmbeddings):
            # In no checkpoint, and empty when a model is built on the meta device to be loaded.
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[-1]).expand((1, -1)))

    @classmethod
    def from_blip(cls, source, **config_overrides):
        """Make a model of this class from transformers' BLIP for the same task; only alignment parameters are new.

        Args:
            source (`PreTrainedModel` or `str`):
                The BLIP model (its weights are copied), or a path or Hub id to load it from.
            config_overrides:
                Fields of [`MadtpBlipConfig`] to set.

        Raises:
            TypeError: if the source is another model than this task's BLIP, or an override is no field of the configuration.
        """
        blip = source
        if not isinstance(source, PreTrainedModel):
            blip, info = cls._blip_class.from_pretrained(source, output_loading_info=True)
            amiss = [str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
            if amiss:
                raise ValueError(
                    f"{source} is no checkpoint of a {cls._blip_class.__name__}: {len(amiss)} of its tensors are missing, not"
                    f" expected or of another shape ({', '.join(sorted(amiss)[:3])}, ...). Expected one of that class."
                )
        if not isinstance(blip, cls._blip_class):
            raise TypeError(
                f"{cls.__name__}.from_blip got a {type(blip).__name__}: expected a {cls._blip_class.__name__}, or a path or Hub id"
                " of one."
            )
        fields = blip.config.to_dict()
        fields.pop("model_type", None)
        defaults = MadtpBlipConfig()
        unknown = [name for name in config_overrides if not hasattr(defaults, name)]
        if unknown:
            raise TypeError(f"{cls.__name__}.from_blip got {', '.join(unknown)}: no such field in MadtpBlipConfig.")
        model = cls(MadtpBlipConfig(**{**fields, **config_overrides})).to(device=blip.device, dtype=blip.dtype)
        missing, unexpected = model.load_state_dict(blip.state_dict(), strict=False)
        missing = [name for name in missing if not name.startswith("alignment.")]
        if missing or unexpected:
            raise ValueError(f"The BLIP model does not fit its configuration: {missing=}, {unexpected=}.")
        if blip.generation_config is not None:
            model.generation_config = copy.deepcopy(blip.generation_config)
        return model.train(blip.training)

    def set_pruning(self, temperature: float | None = None, *, reduction: float | None = None) -> None:
        """Set how much the model prunes, from the next forward pass on; the configuration keeps it.

        Args:
            temperature (`float`, *optional*):
                The threshold's temperature: 0 is off, larger prunes more. `None`, without a reduction, is off.
            reduction (`float`, *optional*):
                The share of FLOPs to save, in [0, 1), by the schedule that `madtp_hf.calibrate` has measured.

        Raises:
            ValueError: for a value that can't be set; the model is left as it was.
        """
        if temperature is not None and reduction is not None:
            raise ValueError(f"Both {temperature=} and {reduction=} were given: expected one of them.")
        if reduction is not None:
            temperature = self.config.temperature_for(reduction)
        before = self.config.pruning_temperature
        self.config.pruning_temperature = 0.0 if temperature is None else temperature
        try:
            self.config.check_pruning()
        except ValueError:
            self.config.pruning_temperature = before
            raise

    @property
    def is_pruning(self) -> bool:
        """Whether pruning is on. Where it is not, the model is transformers' BLIP: its decoder reads a question's padding, too."""
        return self.config.pruning_temperature > 0

    def _branch_pruning(self, modality: str, with_feature: bool) -> BranchPruning | None:
        config = self.config
        if not self.is_pruning:
            return None
        prunes = modality in config.pruning_modalities
        if not (prunes or with_feature):
            return None
        return BranchPruning(
            self.alignment.tokens,
            self.alignment.vision_projection if modality == "vision" else self.alignment.text_projection,
            float(config.pruning_temperature) if prunes else 0.0,
            config.pruning_granularity,
            with_feature,
        )

    def _alignment_loss(self, vision: BranchOutput, text: BranchOutput) -> torch.Tensor:
        if vision.feature is None:
            # Pruning is off. The alignment parameters still get a gradient, of 0: distributed training waits for one from each.
            return 0.0 * sum(parameter.sum() for parameter in self.alignment.parameters())
        return alignment_loss(vision.feature, text.feature)


class MadtpBlipForQuestionAnswering(MadtpBlipPreTrainedModel, GenerationMixin):
    """BLIP for visual question answering that drops the image and question tokens that matter to neither modality."""

    _tied_weights_keys = {
        "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
        "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    }
    task = "vqa"
    _task_auto_class = "AutoModelForVisualQuestionAnswering"
    _task_pipeline = ("visual-question-answering", "pipeline_madtp_blip.MadtpBlipVisualQuestionAnsweringPipeline")
    _blip_class = BlipForQuestionAnswering

    def __init__(self, config: MadtpBlipConfig):
        super().__init__(config)
        self.vision_model = MadtpBlipVisionModel(config.vision_config)
        self.text_encoder = MadtpBlipTextModel(config.text_config)
        self.text_decoder = build_text_decoder(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.text_encoder.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.text_encoder.embeddings.word_embeddings = value

    def _encode(
        self,
        input_ids,
        pixel_values,
        attention_mask,
        interpolate_pos_encoding=False,
        with_feature=False,
        cut_padding=True,
        **vision_outputs,
    ) -> tuple[BranchOutput, BranchOutput]:
        self.config.check_pruning()
        if len(input_ids) != len(pixel_values):
            raise ValueError(
                f"input_ids holds {len(input_ids)} questions and pixel_values {len(pixel_values)} images: expected as many of one"
                " as of the other, an image for each question."
            )
        input_ids, mask = left_align(input_ids, attention_mask, cut=cut_padding)
        if self.config.encoder_token_id is not None:
            input_ids = F.pad(input_ids[:, 1:], (1, 0), value=self.config.encoder_token_id)
        vision = self.vision_model(
            pixel_values,
            self._branch_pruning("vision", with_feature),
            interpolate_pos_encoding,
            **vision_outputs,
        )
        text = self.text_encoder(
            input_ids, mask, self._branch_pruning("text", with_feature), vision.hidden_states, vision.mask
        )
        return vision, text

    @can_return_tuple
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
        r"""
        Args:
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The questions; padding on either side.
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`):
                The images, one for each question.
            decoder_input_ids, decoder_attention_mask (`torch.LongTensor` of shape `(batch_size, answer_length)`, *optional*):
                What the answer decoder reads; `labels` if not given.
            labels (`torch.LongTensor` of shape `(batch_size, answer_length)`, *optional*):
                The answers, the decoder's start token first; tokens at -100 count in no loss.
            output_positions (`bool`, *optional*, defaults to `False`):
                Whether to say where the image tokens that each layer leaves come from.

        Raises:
            ValueError: for inputs of another shape, a question that is all padding or too long, or neither labels nor decoder inputs.
        """
        if labels is None and decoder_input_ids is None:
            raise ValueError(
                "Neither labels nor decoder_input_ids were given: expected labels to train, decoder_input_ids to score an answer;"
                " to get an answer, call generate."
            )
        if output_attentions:
            raise ValueError("output_attentions=True: this model keeps no attention maps. Expected None or False.")
        if decoder_input_ids is None:
            decoder_input_ids = labels.masked_fill(labels == -100, self.config.text_config.pad_token_id)
        longest = self.config.text_config.max_position_embeddings
        if decoder_input_ids.shape[1] > longest:
            raise ValueError(
                f"Answers of {decoder_input_ids.shape[1]} tokens: this model's decoder reads at most {longest}."
            )
        if len(decoder_input_ids) != len(input_ids):
            raise ValueError(
                f"{len(decoder_input_ids)} answers for {len(input_ids)} questions: expected one for each."
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        vision, text = self._encode(
            input_ids,
            pixel_values,
            attention_mask,
            interpolate_pos_encoding,
            with_feature=labels is not None,
            cut_padding=self.is_pruning,
            output_hidden_states=output_hidden_states,
            output_positions=output_positions,
        )
        answer = self.text_decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=text.hidden_states,
            encoder_attention_mask=text.mask if self.is_pruning else None,
            labels=labels,
            reduction="mean",
        )
        loss = task_loss = align_loss = None
        if labels is not None:
            task_loss = answer.loss
            align_loss = self._alignment_loss(vision, text)
            loss = task_loss + self.config.alignment_loss_weight * align_loss
        return MadtpBlipForQuestionAnsweringOutput(
            loss=loss,
            image_embeds=vision.hidden_states,
            last_hidden_state=vision.hidden_states,
            hidden_states=vision.all_hidden_states,
            logits=answer.logits,
            task_loss=task_loss,
            alignment_loss=align_loss,
            vision_tokens=vision.num_tokens,
            text_tokens=text.num_tokens,
            image_mask=vision.mask,
            question_states=text.hidden_states,
            question_mask=text.mask,
            vision_positions=vision.positions,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.LongTensor | None = None,
        interpolate_pos_encoding: bool = False,
        **generate_kwargs,
    ) -> torch.LongTensor:
        """Write an answer to each question, token by token.

        Args:
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The questions; padding on either side.
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`):
                The images.
            generate_kwargs:
                What the decoder's `generate` takes: `max_new_tokens`, `num_beams`, ...

        Returns:
            `torch.LongTensor` of shape `(batch_size, answer_length)`, the start token first.
        """
        _, text = self._encode(
            torch.as_tensor(input_ids, device=pixel_values.device),
            pixel_values,
            attention_mask,
            interpolate_pos_encoding,
            cut_padding=self.is_pruning,
        )
        states, text_config = text.hidden_states, self.config.text_config
        mask = text.mask if self.is_pruning else None
        return self.text_decoder.generate(
            input_ids=torch.full((len(states), 1), text_config.bos_token_id, device=states.device),
            eos_token_id=text_config.sep_token_id,
            pad_token_id=text_config.pad_token_id,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            **generate_kwargs,
        )

    def as_pipeline(self, processor, **kwargs):
        """The model, as it is, behind the pipeline that its checkpoints carry: `model.as_pipeline(processor)(image=..., question=...)`."""
        from .pipeline_madtp_blip import MadtpBlipVisualQuestionAnsweringPipeline

        return MadtpBlipVisualQuestionAnsweringPipeline(
            model=self,
            tokenizer=processor.tokenizer,
            image_processor=processor.image_processor,
            task="visual-question-answering",
            device=self.device,
            **kwargs,
        )

    def _decode(self, answer_ids: torch.Tensor, text: BranchOutput) -> torch.Tensor:
        """The decoder's last states (B, K, A, D) of K answers (B, K, A) to each of B questions.

        The question's states serve all its answers as they are: in cross-attention the answers lie end to end as one sequence of
        queries.
        """
        batch_size, num_answers, _ = answer_ids.shape
        decoder = self.text_decoder.bert
        hidden_states = decoder.embeddings(answer_ids.flatten(0, 1))
        for layer in decoder.encoder.layer:
            hidden_states, _ = text_attention(layer.attention, hidden_states, hidden_states, is_causal=True)
            queries = hidden_states.unflatten(0, (batch_size, num_answers)).flatten(1, 2)
            queries, _ = text_attention(layer.crossattention, queries, text.hidden_states, text.mask)
            hidden_states = layer.feed_forward_chunk(queries.view_as(hidden_states))
        return hidden_states.unflatten(0, (batch_size, num_answers))

    @torch.no_grad()
    def rank_answers(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.LongTensor | None,
        answer_input_ids: torch.LongTensor,
        answer_attention_mask: torch.LongTensor | None = None,
        k: int = 128,
    ) -> torch.LongTensor:
        """Choose each question's answer from a fixed list, as BLIP evaluates VQA: of the k answers whose first token is the likeliest,
        the one that is likeliest as a whole.

        Args:
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The questions.
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`):
                The images.
            answer_input_ids, answer_attention_mask (`torch.LongTensor` of shape `(num_answers, answer_length)`):
                The list, as the tokenizer gives it; the first token is replaced by the decoder's start token.
            k (`int`, *optional*, defaults to 128):
                How many answers to score as a whole; all if there are fewer.

        Returns:
            `torch.LongTensor` of shape `(batch_size,)`: indices into the list.
        """
        if k < 1:
            raise ValueError(f"k={k}: expected the number of answers to score, at least 1.")
        text_config = self.config.text_config
        if answer_attention_mask is None:
            answer_attention_mask = answer_input_ids != text_config.pad_token_id
        answer_ids, answer_mask = left_align(answer_input_ids, answer_attention_mask)
        lengths = (
            torch.full((len(answer_ids),), answer_ids.shape[1]) if answer_mask is None else answer_mask.sum(dim=1)
        )
        if lengths.amin() < 2 or lengths.amax() > text_config.max_position_embeddings:
            raise ValueError(
                f"answer_input_ids hold answers of {int(lengths.amin())} to {int(lengths.amax())} tokens: expected a start token, at"
                f" least one token behind it and at most {text_config.max_position_embeddings} in all."
            )
        answer_ids = F.pad(answer_ids[:, 1:], (1, 0), value=text_config.bos_token_id)
        targets = answer_ids if answer_mask is None else answer_ids.masked_fill(~answer_mask, -100)

        _, text = self._encode(input_ids, pixel_values, attention_mask)
        start = answer_ids[:1, :1].expand(len(input_ids), 1, 1)
        first_logits = self.text_decoder.cls(self._decode(start, text)[:, 0, 0])
        shortlist = first_logits[:, answer_ids[:, 1]].argsort(dim=1, descending=True, stable=True)[:, :k]
        states = self._decode(answer_ids[shortlist], text)
        # One question at a time: k answers' scores over the whole vocabulary are the largest tensor here by far.
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


__all__ = ["MadtpBlipForQuestionAnswering", "MadtpBlipPreTrainedModel"]
