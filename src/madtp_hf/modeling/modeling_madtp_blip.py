"""BLIP with MADTP token pruning: the four tasks.

Where a task is one of transformers' BLIP, so are its parameters' names and, with pruning off, its outputs. The encoders are in `encoders.py`, what a
pruned layer does to its tokens in `token_pruning.py`. Text decoders are transformers' own but for their attention.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.models.blip.modeling_blip import (
    BlipForConditionalGenerationModelOutput,
    BlipImageTextMatchingModelOutput,
    BlipPreTrainedModel,
    BlipTextVisionModelOutput,
)
from transformers.models.blip.modeling_blip_text import BlipTextEmbeddings
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_madtp_blip import MadtpBlipConfig
from .encoders import (
    CACHE_ARGUMENT,
    BranchOutput,
    BranchPruning,
    MadtpBlipPairTextLayer,
    MadtpBlipTextModel,
    MadtpBlipVisionModel,
    MergeLayer,
    attention_function,
    build_text_decoder,
    cross_attention_cache,
    query_key_value,
)
from .packed_linear import can_pack, pack_linear_maps
from .packing import pack
from .retrieval_loss import (
    TEMPERATURE,
    ContrastiveKeys,
    contrastive_loss,
    draw_hard_negatives,
    gather_padded,
    gather_rows,
    process_rank,
)
from .token_pruning import alignment_loss

# Not used here, but older transformers (5.0) bring along only the files that this one imports itself.
from .triton_attention import is_available  # noqa: F401
from .versions import VERSION  # noqa: F401


@dataclass
class PruningOutput:
    r"""
    What the outputs of all tasks add to transformers' own.

    task_loss (`torch.Tensor`, *optional*):
        The task's loss; `loss` is this and, with pruning on, `alignment_loss_weight * alignment_loss`.
    alignment_loss (`torch.Tensor`, *optional*):
        How far image and text are from gathering the same at the alignment tokens; 0 with pruning off, and where no text is encoded.
    vision_tokens, text_tokens (`torch.LongTensor` of shape `(num_layers + 1, batch_size)`):
        The number of tokens that enter the encoder and that each of its layers leaves, class token included, padding not. For two images a
        sample, vision_tokens is `(num_layers + 1, 2, batch_size)`.
    image_mask (`torch.BoolTensor` of shape `(batch_size, image_length)`, *optional*):
        True at the real tokens of `image_embeds`; `None` where there is no padding.
    vision_positions (`tuple(torch.LongTensor)`, *optional*, returned with `output_positions=True`):
        For what enters the vision encoder and what each layer leaves, `(batch_size, length)`: where each token was in the input, 0 the
        class token and n the n-th patch; -1 for merged tokens and padding.
    """

    task_loss: torch.Tensor | None = None
    alignment_loss: torch.Tensor | None = None
    vision_tokens: torch.Tensor | None = None
    text_tokens: torch.Tensor | None = None
    image_mask: torch.Tensor | None = None
    vision_positions: tuple[torch.Tensor, ...] | None = None


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
        True at its real tokens; `None` where there is no padding.
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
    itm_score (`torch.Tensor` of shape `(batch_size, 2)`, or `(image_batch_size, text_batch_size)` with `use_itm_head=False`):
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
        True at its real tokens; `None` where there is no padding.
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
class MadtpBlipForImagesAndTextClassificationOutput(PruningOutput, ModelOutput):
    r"""
    loss (`torch.Tensor`, *optional*, returned when `labels` is provided):
        `task_loss`, the cross-entropy, and the alignment loss.
    logits (`torch.Tensor` of shape `(batch_size, 2)`):
        The scores of "false" and "true".
    image_embeds (`torch.Tensor` of shape `(batch_size, 2, image_length, hidden_size)`):
        The states of the image tokens that are left, the left image first, the class token first.
    hidden_states (`tuple(torch.Tensor)`, *optional*, returned with `output_hidden_states=True`):
        The states that enter the vision encoder, then those that leave each of its layers, `(2 * batch_size, length, hidden_size)`, the left
        and the right image of each sample in turn.
    text_states (`torch.Tensor` of shape `(batch_size, text_length, hidden_size)`):
        The states of the text tokens that are left, the class token first.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    text_states: torch.Tensor | None = None


class MadtpBlipAlignment(nn.Module):
    """The alignment tokens (T, D) that both branches share, and the maps to their width for branches of another."""

    def __init__(self, config: MadtpBlipConfig):
        super().__init__()
        width = config.alignment_dim or config.text_config.hidden_size

        def projection(branch_width):
            return None if branch_width == width else nn.Linear(branch_width, width)

        self.tokens = nn.Parameter(torch.empty(config.num_alignment_tokens, width))
        self.vision_projection = projection(config.vision_config.hidden_size)
        self.text_projection = projection(config.text_config.hidden_size)


def check_same_shape(name: str, tensor: torch.Tensor, input_ids: torch.Tensor) -> None:
    if tensor.shape != input_ids.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and input_ids {tuple(input_ids.shape)}: expected the same."
        )


def text_lengths(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """The number of real tokens in each text (B,), that of the shortest and that of the longest; a `ValueError` for a mask that can't be."""
    check_same_shape("attention_mask", attention_mask, input_ids)
    lengths = attention_mask.bool().sum(dim=1)
    shortest, longest = torch.stack(lengths.aminmax()).tolist()
    if shortest == 0:
        rows = (lengths == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"attention_mask is 0 everywhere in row {rows}: expected at least one real token in each text."
        )
    return lengths, shortest, longest


def left_align(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cut: bool = True, static: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Move padding, wherever it is, behind the text, and `cut` what no text of the batch needs.

    input_ids, attention_mask (B, L) -> input_ids (B, M), mask (B, M) bool or None where nothing is padded. So neither the side nor the
    length of padding matters to what follows. `static`: neither cut nor look at the values, so that nothing waits for the device and shapes
    follow from shapes.
    """
    if attention_mask is None:
        return input_ids, None
    if static:
        check_same_shape("attention_mask", attention_mask, input_ids)
        real = attention_mask.bool()
        width = input_ids.shape[1]
        # A stable sort, by an operation that ONNX knows.
        order = (real * width - torch.arange(width, device=real.device)).topk(width).indices
        return input_ids.gather(1, order), real.gather(1, order)
    lengths, shortest, longest = text_lengths(input_ids, attention_mask)
    real = attention_mask.bool()
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
    # What `push_to_hub` and `Trainer` write into a model card's metadata.
    model_tags = ["blip", "madtp", "token-pruning"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = [
        "MadtpBlipVisionLayer",
        "MadtpBlipTextLayer",
        "MadtpBlipPairTextLayer",
        "BlipTextLayer",
        "BlipTextEmbeddings",
    ]
    # `save_pretrained` brings the code along for `AutoModel`; a task adds its own auto class and pipeline where there is one.
    _auto_class = "AutoModel"
    task = None  # as `madtp_hf.count_flops` names it
    _task_auto_class = None
    _task_pipeline = None
    _blip_classes = ()  # transformers' models that `from_blip` takes
    _new_in_task = ("alignment.",)  # parameters that those don't have
    # The loss is a mean over this batch; `Trainer` is to divide it by its accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: MadtpBlipConfig):
        super().__init__(config)
        self.model_tags = list(self.model_tags)  # `add_model_tags` and `push_to_hub(tags=...)` add to it
        config.check_pruning()
        name = f"modeling_madtp_blip.{type(self).__name__}"
        config.auto_map = {"AutoConfig": "configuration_madtp_blip.MadtpBlipConfig", "AutoModel": name}
        if self._task_auto_class is not None:
            config.auto_map[self._task_auto_class] = name
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
        elif isinstance(module, MergeLayer):
            # Begin as the layers before do, with the mean of what is seen of both images.
            init.copy_(module.weight, torch.eye(module.out_features).repeat(1, 2) / 2)
            init.zeros_(module.bias)
        elif isinstance(module, BlipTextEmbeddings):
            # In no checkpoint, and empty when a model is built on the meta device to be loaded.
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[-1]).expand((1, -1)))

    @classmethod
    def from_pretrained(cls, *args, config=None, **kwargs):
        # `AutoModel` remembers one model class for a configuration's class. Of two local checkpoints with the same folder name it would load
        # the second, of another task, with the first one's class.
        named = globals().get((getattr(config, "architectures", None) or [None])[0])
        if named is not None and named is not cls and issubclass(named, MadtpBlipPreTrainedModel):
            return named.from_pretrained(*args, config=config, **kwargs)
        return super().from_pretrained(*args, config=config, **kwargs)

    @classmethod
    def from_blip(cls, source, **config_overrides):
        """Make a model of this class from transformers' BLIP for the same task; only alignment parameters are new.

        For NLVR2, which transformers doesn't have, the source is its BLIP for retrieval or question answering, and what only NLVR2 has is new
        as well.

        Args:
            source (`PreTrainedModel` or `str`):
                The BLIP model (its weights are copied), or a path or Hub id to load it from. A model of this class will do, too.
            config_overrides:
                Fields of [`MadtpBlipConfig`] to set.

        Raises:
            TypeError: if the source is another model than this task's BLIP, or an override is no field of the configuration.
        """
        classes = (*cls._blip_classes, cls)
        expected = " or a ".join(blip_class.__name__ for blip_class in classes)
        blip = source
        if not isinstance(source, PreTrainedModel):
            saved = BlipConfig.get_config_dict(source)[0].get("architectures") or []
            blip_class = next((c for c in classes if c.__name__ in saved), classes[0])
            blip, info = blip_class.from_pretrained(source, output_loading_info=True)
            amiss = [str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
            if amiss:
                raise ValueError(
                    f"{source} is no checkpoint of a {expected}: {len(amiss)} of its tensors are missing, not"
                    f" expected or of another shape ({', '.join(sorted(amiss)[:3])}, ...). Expected one of that class."
                )
        if not isinstance(blip, classes):
            raise TypeError(
                f"{cls.__name__}.from_blip got a {type(blip).__name__}: expected a {expected}, or a path or Hub id of one."
            )
        fields = blip.config.to_dict()
        fields.pop("model_type", None)
        defaults = MadtpBlipConfig()
        unknown = [name for name in config_overrides if not hasattr(defaults, name)]
        if unknown:
            raise TypeError(f"{cls.__name__}.from_blip got {', '.join(unknown)}: no such field in MadtpBlipConfig.")
        model = cls(MadtpBlipConfig(**{**fields, **config_overrides})).to(device=blip.device, dtype=blip.dtype)
        weights = {name: tensor for name, tensor in blip.state_dict().items() if not name.startswith("alignment.")}
        if not isinstance(blip, cls):
            weights = cls._from_blip_weights(weights)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        missing = [name for name in missing if not any(new in name for new in cls._new_in_task)]
        if missing or unexpected:
            raise ValueError(f"The BLIP model does not fit its configuration: {missing=}, {unexpected=}.")
        if cls.can_generate() and blip.generation_config is not None:
            model.generation_config = copy.deepcopy(blip.generation_config)
        return model.train(blip.training)

    @classmethod
    def _from_blip_weights(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return state_dict

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

    def pack_weights(self, packed: bool = True):
        """Lay the weights of linear maps out for fast inference on a CPU in float32, or, with `packed=False`, no longer.

        Outputs are the same to rounding; what is saved doesn't change. It takes as much memory again as the weights. Training, other devices and
        other types go on with the weights as they are.

        Returns:
            The model itself.

        Raises:
            RuntimeError: if torch was built without oneDNN.
        """
        if packed and not can_pack():
            raise RuntimeError(
                "pack_weights needs torch with oneDNN, and this one has none: expected a build where torch.backends.mkldnn.is_available();"
                " go on without, the model runs as it is."
            )
        pack_linear_maps(self, packed)
        return self

    def get_input_embeddings(self):
        return self.text_encoder.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.text_encoder.embeddings.word_embeddings = value

    def get_output_embeddings(self):
        # Of the tasks that write. peft has to know it: tied to the words, it is no linear map to adapt.
        return self.text_decoder.get_output_embeddings() if hasattr(self, "text_decoder") else None

    def set_output_embeddings(self, new_embeddings):
        self.text_decoder.set_output_embeddings(new_embeddings)

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
        counts = config.token_counts()
        return BranchPruning(
            self.alignment.tokens,
            self.alignment.vision_projection if modality == "vision" else self.alignment.text_projection,
            float(config.pruning_temperature) if prunes else 0.0,
            config.pruning_granularity,
            with_feature,
            None if counts is None or not prunes else counts[modality],
        )

    def _encode_images(self, pixel_values, with_feature=False, interpolate_pos_encoding=False, **outputs):
        """pixel_values (B, 3, H, W) -> `BranchOutput`; `outputs`: what the vision model is asked for besides."""
        self.config.check_pruning()
        pruning = self._branch_pruning("vision", with_feature)
        return self.vision_model(pixel_values, pruning, interpolate_pos_encoding, **outputs)

    def _encode_text(self, input_ids, attention_mask, *images, with_feature=False) -> BranchOutput:
        """Texts (B, L) about `images`, the states and layout of each image that a text meets; none for the texts by themselves."""
        frozen = self.is_pruning and self.config.pruning_granularity == "frozen"
        packed = self.is_pruning and not frozen
        input_ids, mask = left_align(input_ids, attention_mask, cut=packed, static=frozen)
        if images and self.config.encoder_token_id is not None:
            input_ids = F.pad(input_ids[:, 1:], (1, 0), value=self.config.encoder_token_id)
        pruning = self._branch_pruning("text", with_feature)
        return self.text_encoder(input_ids, *images, mask=mask, packed=packed, pruning=pruning)

    def _no_alignment_loss(self) -> torch.Tensor:
        # The alignment parameters still get a gradient, of 0: distributed training waits for one from each.
        return 0.0 * sum(parameter.sum() for parameter in self.alignment.parameters())

    def _alignment_loss(self, image_feature: torch.Tensor | None, text_feature: torch.Tensor | None) -> torch.Tensor:
        if image_feature is None:  # pruning is off
            return self._no_alignment_loss()
        return alignment_loss(image_feature, text_feature)

    def _vision_outputs(self, output_hidden_states, output_attentions, output_positions) -> dict[str, bool]:
        if output_attentions:
            raise ValueError("output_attentions=True: this model keeps no attention maps. Expected None or False.")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return {"output_hidden_states": output_hidden_states, "output_positions": output_positions}

    def _generate(self, input_ids, encoded: BranchOutput, mask, **generate_kwargs) -> torch.LongTensor:
        """Let the text decoder go on from input_ids (B, L), reading what was encoded, at padding as well where there is no mask (B, M)."""
        text_config = self.config.text_config

        def setting(name):
            """As `generate` will find it: an argument, a field of the configuration that is given, or of the decoder's own."""
            given = [
                generate_kwargs.get(name),
                getattr(generate_kwargs.get("generation_config"), name, None),
                getattr(self.text_decoder.generation_config, name, None),
            ]
            return next((value for value in given if value is not None), None)

        caches = setting("use_cache") is not False and setting("cache_implementation") is None
        if "past_key_values" in generate_kwargs:  # by whichever name the caller knows it
            generate_kwargs[CACHE_ARGUMENT] = generate_kwargs.pop("past_key_values")
        if caches and generate_kwargs.get(CACHE_ARGUMENT) is None:
            generate_kwargs["use_cache"] = True
            generate_kwargs[CACHE_ARGUMENT] = cross_attention_cache(self.text_decoder, encoded.states, encoded.layout)
        return self.text_decoder.generate(
            input_ids=input_ids,
            eos_token_id=text_config.sep_token_id,
            pad_token_id=text_config.pad_token_id,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attention_mask=mask,
            **generate_kwargs,
        )


def check_same_number(images, texts: torch.Tensor, kind: str) -> None:
    if images.shape[0] != texts.shape[0]:
        raise ValueError(
            f"input_ids holds {len(texts)} {kind} and pixel_values {len(images)} images: expected as many of one as of the other."
        )


class MadtpBlipForQuestionAnswering(MadtpBlipPreTrainedModel, GenerationMixin):
    """BLIP for visual question answering that drops the image and question tokens that matter to neither modality."""

    _tied_weights_keys = {
        "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
        "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    }
    task = "vqa"
    _task_auto_class = "AutoModelForVisualQuestionAnswering"
    _task_pipeline = ("visual-question-answering", "pipeline_madtp_blip.MadtpBlipVisualQuestionAnsweringPipeline")
    _blip_classes = (BlipForQuestionAnswering,)

    def __init__(self, config: MadtpBlipConfig):
        super().__init__(config)
        self.vision_model = MadtpBlipVisionModel(config.vision_config)
        self.text_encoder = MadtpBlipTextModel(config.text_config)
        self.text_decoder = build_text_decoder(config.text_config, config.text_config.hidden_size)
        self.post_init()

    def _encode(self, input_ids, pixel_values, attention_mask, with_feature=False, **vision_options):
        """The states of the images and of the questions about them, a `BranchOutput` each."""
        check_same_number(pixel_values, input_ids, "questions")
        vision = self._encode_images(pixel_values, with_feature, **vision_options)
        text = self._encode_text(input_ids, attention_mask, vision.states, vision.layout, with_feature=with_feature)
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
        if decoder_input_ids is None:
            decoder_input_ids = labels.masked_fill(labels == -100, self.config.text_config.pad_token_id)
        longest = self.config.text_config.max_position_embeddings
        if decoder_input_ids.shape[1] > longest:
            raise ValueError(
                f"Answers of {decoder_input_ids.shape[1]} tokens: this model's decoder reads at most {longest}."
            )
        if decoder_input_ids.shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"{len(decoder_input_ids)} answers for {len(input_ids)} questions: expected one for each."
            )

        vision, text = self._encode(
            input_ids,
            pixel_values,
            attention_mask,
            with_feature=labels is not None,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **self._vision_outputs(output_hidden_states, output_attentions, output_positions),
        )
        question_states = text.hidden_states
        answer = self.text_decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=question_states,
            encoder_attention_mask=text.mask if self.is_pruning else None,
            labels=labels,
            reduction="mean",
            use_cache=False,
        )
        image_embeds = vision.hidden_states
        loss = task_loss = align_loss = None
        if labels is not None:
            task_loss = answer.loss
            align_loss = self._alignment_loss(vision.feature, text.feature)
            loss = task_loss + self.config.alignment_loss_weight * align_loss
        return MadtpBlipForQuestionAnsweringOutput(
            loss=loss,
            image_embeds=image_embeds,
            last_hidden_state=image_embeds,
            hidden_states=vision.all_hidden_states,
            logits=answer.logits,
            task_loss=task_loss,
            alignment_loss=align_loss,
            vision_tokens=vision.num_tokens,
            text_tokens=text.num_tokens,
            image_mask=vision.mask,
            question_states=question_states,
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
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        start = torch.full((len(pixel_values), 1), self.config.text_config.bos_token_id, device=pixel_values.device)
        return self._generate(start, text, text.mask if self.is_pruning else None, **generate_kwargs)

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
        states = decoder.embeddings(answer_ids.flatten(0, 1))
        question, mask = text.hidden_states, text.mask

        def context_of(attention, states, context_states, mask=None, is_causal=False):
            query_key_values = query_key_value(attention, states, context_states)
            query, key, value = (heads.transpose(1, 2) for heads in query_key_values)
            context = attention_function("sdpa", query, key, value, mask, 0.0, is_causal)
            return context.transpose(1, 2).flatten(2)

        for layer in decoder.encoder.layer:
            context = context_of(layer.attention.self, states, states, is_causal=True)
            states = layer.attention.output(context, states)
            queries = states.unflatten(0, (batch_size, num_answers)).flatten(1, 2)
            context = context_of(layer.crossattention.self, queries, question, mask)
            queries = layer.crossattention.output(context, queries)
            states = layer.feed_forward_chunk(queries.view_as(states))
        return states.unflatten(0, (batch_size, num_answers))

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


class MadtpBlipForConditionalGeneration(MadtpBlipPreTrainedModel, GenerationMixin):
    """BLIP for image captioning that drops the image tokens that matter least. There is no text encoder: only the image is pruned."""

    main_input_name = "pixel_values"
    _tied_weights_keys = MadtpBlipForQuestionAnswering._tied_weights_keys
    task = "captioning"
    _task_auto_class = "AutoModelForImageTextToText"
    _blip_classes = (BlipForConditionalGeneration,)

    def __init__(self, config: MadtpBlipConfig):
        super().__init__(config)
        self.vision_model = MadtpBlipVisionModel(config.vision_config)
        self.text_decoder = build_text_decoder(config.text_config, config.vision_config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.text_decoder.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.text_decoder.set_input_embeddings(value)

    @can_return_tuple
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
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`):
                The images.
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The captions that the decoder reads, its start token first, padding behind; `labels` if not given.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The captions; tokens at -100, as those of a prompt, count in no loss.
            output_positions (`bool`, *optional*, defaults to `False`):
                Whether to say where the image tokens that each layer leaves come from.

        Raises:
            ValueError: for inputs of another shape, a caption that is all padding or too long, or no input_ids.
        """
        if input_ids is None:
            if labels is None or (labels[:, 0] == -100).any():
                raise ValueError(
                    "input_ids is missing: expected the captions that the decoder reads, and labels beside them to train (labels alone will"
                    " do if none of their first tokens is at -100, as a prompt's are); to get a caption, call generate."
                )
            input_ids = labels.masked_fill(labels == -100, self.config.text_config.pad_token_id)
        check_same_number(pixel_values, input_ids, "captions")
        longest = self.config.text_config.max_position_embeddings
        if input_ids.shape[1] > longest:
            raise ValueError(f"Captions of {input_ids.shape[1]} tokens: this model's decoder reads at most {longest}.")
        if labels is not None:
            check_same_shape("labels", labels, input_ids)
        if attention_mask is not None:
            text_lengths(input_ids, attention_mask)
        vision = self._encode_images(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **self._vision_outputs(output_hidden_states, output_attentions, output_positions),
        )
        image_embeds = vision.hidden_states
        caption = self.text_decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=vision.mask,
            labels=labels,
            reduction="mean",
            logits_to_keep=logits_to_keep,
            use_cache=False,  # or it would keep every layer's keys and values of the image, for nobody
        )
        loss = align_loss = None
        if labels is not None:
            align_loss = self._no_alignment_loss()
            loss = caption.loss + align_loss
        return MadtpBlipForConditionalGenerationOutput(
            loss=loss,
            logits=caption.logits,
            image_embeds=image_embeds,
            last_hidden_state=image_embeds,
            hidden_states=vision.all_hidden_states,
            task_loss=caption.loss,
            alignment_loss=align_loss,
            vision_tokens=vision.num_tokens,
            image_mask=vision.mask,
            vision_positions=vision.positions,
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        interpolate_pos_encoding: bool = False,
        **generate_kwargs,
    ) -> torch.LongTensor:
        """Write a caption of each image, token by token.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`):
                The images.
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                A prompt to go on from, as the tokenizer gives it: the first token becomes the decoder's start token, the last one, `[SEP]`,
                goes. The prompts of a batch are to be of one length.
            generate_kwargs:
                What the decoder's `generate` takes: `max_new_tokens`, `num_beams`, ...

        Returns:
            `torch.LongTensor` of shape `(batch_size, caption_length)`, start token and prompt first.
        """
        vision = self._encode_images(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        start = self.config.text_config.bos_token_id
        if input_ids is None:
            prompt = torch.full((len(pixel_values), 1), start, device=pixel_values.device)
        else:
            input_ids = torch.as_tensor(input_ids, device=pixel_values.device)
            check_same_number(pixel_values, input_ids, "prompts")
            prompt = F.pad(input_ids[:, 1:-1], (1, 0), value=start)
        if attention_mask is not None:
            generate_kwargs["attention_mask"] = attention_mask[:, :-1]
        return self._generate(prompt, vision, vision.mask, **generate_kwargs)


class MadtpBlipForImagesAndTextClassification(MadtpBlipPreTrainedModel):
    """BLIP for visual reasoning over two images (NLVR2): is a sentence about them true? Drops the tokens of either image and of the
    sentence that matter to neither modality.

    transformers has no such BLIP. The text encoder has two cross-attentions a layer, one for each image: what it sees of the two is averaged, from
    layer 6 on concatenated and projected by a merge layer. Parameters that transformers doesn't have are named as in the original BLIP.
    """

    task = "nlvr2"
    _blip_classes = (BlipForImageTextRetrieval, BlipForQuestionAnswering)
    _new_in_task = ("alignment.", "merge_layer.", "cls_head.")

    def __init__(self, config: MadtpBlipConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.vision_model = MadtpBlipVisionModel(config.vision_config)
        self.text_encoder = MadtpBlipTextModel(config.text_config, MadtpBlipPairTextLayer)
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.post_init()

    @classmethod
    def _from_blip_weights(cls, state_dict):
        """Both cross-attentions of a layer start as BLIP's one, as the original's fine-tuning does; its other heads stay behind."""
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
        r"""
        Args:
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The sentences; padding on either side.
            pixel_values (`torch.Tensor` of shape `(batch_size, 2, 3, image_size, image_size)`):
                The two images of each, the left one first.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                1 where the sentence is true, 0 where it is false.
            output_positions (`bool`, *optional*, defaults to `False`):
                Whether to say where the image tokens that each layer leaves come from, `(2 * batch_size, length)`, left and right in turn.

        Raises:
            ValueError: for inputs of another shape, labels that are neither 0 nor 1, or a sentence that is all padding or too long.
        """
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}: expected (batch_size, 2, 3, height, width), the left and the right"
                " image of each sentence."
            )
        check_same_number(pixel_values, input_ids, "sentences")
        if labels is not None and labels.shape != input_ids.shape[:1]:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}: expected ({len(input_ids)},), one label for each sentence."
            )
        if labels is not None and ((labels != 0) & (labels != 1)).any():
            raise ValueError(
                f"labels holds {labels.unique().tolist()}: expected 1 where a sentence is true and 0 where it is false."
            )
        with_feature = labels is not None
        vision = self._encode_images(
            pixel_values.flatten(0, 1),
            with_feature,
            interpolate_pos_encoding,
            **self._vision_outputs(output_hidden_states, output_attentions, output_positions),
        )
        # (2 * B, ...), left and right in turn
        left, right = (vision.layout.select(vision.states, slice(side, None, 2)) for side in (0, 1))
        text = self._encode_text(input_ids, attention_mask, *left, *right, with_feature=with_feature)
        logits = self.cls_head(text.class_states)

        loss = task_loss = align_loss = None
        if labels is not None:
            task_loss = F.cross_entropy(logits, labels)
            image_feature = None if vision.feature is None else vision.feature.unflatten(0, (-1, 2)).mean(dim=1)
            align_loss = self._alignment_loss(image_feature, text.feature)
            loss = task_loss + self.config.alignment_loss_weight * align_loss
        return MadtpBlipForImagesAndTextClassificationOutput(
            loss=loss,
            logits=logits,
            image_embeds=vision.hidden_states.unflatten(0, (-1, 2)),
            hidden_states=vision.all_hidden_states,
            text_states=text.hidden_states,
            task_loss=task_loss,
            alignment_loss=align_loss,
            vision_tokens=vision.num_tokens.unflatten(1, (-1, 2)).transpose(1, 2),
            text_tokens=text.num_tokens,
            image_mask=None if vision.mask is None else vision.mask.unflatten(0, (-1, 2)),
            vision_positions=vision.positions,
        )


class MadtpBlipForImageTextRetrieval(MadtpBlipPreTrainedModel):
    """BLIP for image-text retrieval that drops the image and text tokens that matter to neither modality.

    Three passes: images alone and texts alone, for features whose products are similarities, and a text that looks at an image, for a
    matching score. With `return_loss=True` the three train together, on contrast within the batch and hard negatives from it;
    `madtp_hf.RetrievalTrainer` adds what BLIP was trained with besides, a momentum twin and queues of its features.
    """

    task = "retrieval"
    _blip_classes = (BlipForImageTextRetrieval,)

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
        return F.normalize(self.vision_proj(images.class_states), dim=-1)

    def _text_feature(self, texts: BranchOutput) -> torch.Tensor:
        return F.normalize(self.text_proj(texts.class_states), dim=-1)

    def get_image_features(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """pixel_values (B, 3, H, W) -> L2-normalised features (B, image_text_hidden_size)."""
        images = self._encode_images(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return self._image_feature(images)

    def get_text_features(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None
    ) -> torch.Tensor:
        """input_ids, attention_mask (B, L) -> L2-normalised features (B, image_text_hidden_size)."""
        return self._text_feature(self._encode_text(input_ids, attention_mask))

    @can_return_tuple
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
        r"""
        Args:
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The texts; padding on either side.
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`):
                The images; as many as texts, except for similarities (`use_itm_head=False`), which are of each with each.
            use_itm_head (`bool`, *optional*, defaults to `True`):
                Whether to let each text look at its image and say whether they match; else, the similarities of all images and all texts.
            return_loss (`bool`, *optional*):
                Whether to train: images and texts are taken as pairs, every other pair of the batch, on all processes, as no match.
            image_ids (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Which image each is, so that other texts of the same image are no negatives; all different if not given.
            contrastive_keys (`ContrastiveKeys`, *optional*):
                What to contrast with instead of the batch: `madtp_hf.RetrievalTrainer` gives a momentum twin's features.
            output_positions (`bool`, *optional*, defaults to `False`):
                Whether to say where the image tokens that each layer leaves come from.

        Raises:
            ValueError: for inputs of another shape, a text that is all padding or too long, or, in training, a batch of one image alone.
        """
        if use_itm_head or return_loss:
            check_same_number(pixel_values, input_ids, "texts")
        if image_ids is not None and image_ids.shape != input_ids.shape[:1]:
            raise ValueError(
                f"image_ids has shape {tuple(image_ids.shape)}: expected ({len(input_ids)},), one number for each image."
            )
        with_feature = bool(return_loss or not use_itm_head)
        vision = self._encode_images(
            pixel_values,
            with_feature,
            interpolate_pos_encoding,
            **self._vision_outputs(output_hidden_states, output_attentions, output_positions),
        )
        image_feature = text_feature = align_loss = None
        losses = {}
        if with_feature:
            text = self._encode_text(input_ids, attention_mask, with_feature=True)
            image_feature, text_feature = self._image_feature(vision), self._text_feature(text)
            if pixel_values.shape[0] == input_ids.shape[0]:
                align_loss = self._alignment_loss(vision.feature, text.feature)
        if use_itm_head or return_loss:
            text = self._encode_text(input_ids, attention_mask, vision.states, vision.layout)
            itm_score = self.itm_head(text.class_states)
        else:
            itm_score = image_feature @ text_feature.T
        if return_loss:
            if image_ids is None:
                image_ids = torch.arange(len(input_ids), device=input_ids.device) + process_rank() * len(input_ids)
            contrastive = contrastive_loss(image_feature, text_feature, image_ids, contrastive_keys)
            temperature = TEMPERATURE if contrastive_keys is None else contrastive_keys.temperature.detach()
            negatives = self._score_hard_negatives(
                input_ids, attention_mask, vision, image_feature, text_feature, image_ids, temperature
            )
            labels = torch.zeros(len(itm_score) + len(negatives), dtype=torch.long, device=itm_score.device)
            labels[: len(itm_score)] = 1
            matching = F.cross_entropy(torch.cat([itm_score, negatives]), labels)
            task_loss = contrastive + matching
            losses = {
                "loss": task_loss + self.config.alignment_loss_weight * align_loss,
                "task_loss": task_loss,
                "contrastive_loss": contrastive,
                "matching_loss": matching,
            }
        image_embeds = vision.hidden_states
        return MadtpBlipForImageTextRetrievalOutput(
            itm_score=itm_score,
            image_embeds=image_embeds,
            last_hidden_state=image_embeds,
            hidden_states=vision.all_hidden_states,
            question_embeds=text.hidden_states,
            alignment_loss=align_loss,
            vision_tokens=vision.num_tokens,
            text_tokens=text.num_tokens,
            image_mask=vision.mask,
            vision_positions=vision.positions,
            text_mask=text.mask,
            image_feature=image_feature,
            text_feature=text_feature,
            **losses,
        )

    def match(self, input_ids, attention_mask, image_states, image_mask=None) -> torch.Tensor:
        """Matching logits (B, 2) of texts (B, L) with images that were encoded before, their states (B, M, D) and mask (B, M)."""
        text = self._encode_text(input_ids, attention_mask, *pack(image_states, image_mask))
        return self.itm_head(text.class_states)

    def _score_hard_negatives(
        self, input_ids, attention_mask, vision, image_feature, text_feature, image_ids, temperature
    ) -> torch.Tensor:
        """Matching logits (up to 2 * B, 2) of each text with a wrong image and of each image with a wrong text, of all processes'."""
        rank = process_rank()
        text_ids, text_mask = left_align(input_ids, attention_mask)
        all_ids = gather_rows(image_ids)
        states, states_mask = gather_padded(vision.hidden_states, vision.mask)
        texts, texts_mask = gather_padded(text_ids, text_mask)
        other_images, other_texts = (gather_rows(f.detach()) for f in (image_feature, text_feature))
        of_text, wrong_image = draw_hard_negatives(text_feature, other_images, image_ids, all_ids, temperature)
        of_image, wrong_text = draw_hard_negatives(image_feature, other_texts, image_ids, all_ids, temperature)
        start = len(image_ids) * rank
        pairs_text = torch.cat([of_text + start, wrong_text])
        pairs_image = torch.cat([wrong_image, of_image + start])
        return self.match(texts[pairs_text], texts_mask[pairs_text], states[pairs_image], states_mask[pairs_image])


__all__ = [
    "MadtpBlipForConditionalGeneration",
    "MadtpBlipForImageTextRetrieval",
    "MadtpBlipForImagesAndTextClassification",
    "MadtpBlipForQuestionAnswering",
    "MadtpBlipPreTrainedModel",
]
