"""Base class of the four BLIP tasks: encoding, generation and loading from transformers' BLIP."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, Pipeline, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.models.blip.modeling_blip import BlipMLP, BlipPreTrainedModel
from transformers.models.blip.modeling_blip_text import (
    BlipTextEmbeddings,
    BlipTextIntermediate,
)

from .chunks import takes_chunks
from .configuration_madtp_blip import MadtpBlipConfig
from .encoder import BranchOutput
from .madtp_blip_decoder import (
    CACHE_ARGUMENT,
    TAKES_FINISHED_MASKS,
    TextDecoder,
    cross_attention_cache,
    cross_attention_mask,
)
from .madtp_blip_encoders import MergeLayer
from .padding import check_same_number, check_same_shape, left_align, text_lengths
from .pruned_model import PrunedModelMixin
from .sequences import Sequences, unpad


if TYPE_CHECKING:
    from typing_extensions import Self


class MadtpBlipPreTrainedModel(PrunedModelMixin, BlipPreTrainedModel):
    """Base class of the models of the four tasks."""

    config: MadtpBlipConfig
    config_class = MadtpBlipConfig
    _from_dense_name = "from_blip"
    base_model_prefix = "madtp_blip"
    # `push_to_hub` and `Trainer` write these into a model card's metadata.
    model_tags = ["blip", "madtp", "token-pruning"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = [
        "MadtpBlipVisionLayer",
        "MadtpBlipTextLayer",
        "MadtpBlipPairTextLayer",
        "BlipTextLayer",
        "BlipTextEmbeddings",
        "BlipVisionEmbeddings",
    ]
    _fused_activations = {
        BlipMLP: ("fc1", "activation_fn"),
        BlipTextIntermediate: ("dense", "intermediate_act_fn"),
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MergeLayer):
            # Start as the mean of both images' cross-attention outputs, which earlier layers compute.
            init.copy_(module.weight, torch.eye(module.out_features, device=module.weight.device).repeat(1, 2) / 2)
            init.zeros_(module.bias)
        elif isinstance(module, BlipTextEmbeddings):
            # Checkpoints don't hold them, and they are uninitialized after loading through the meta device.
            positions = torch.arange(module.position_ids.shape[-1], device=module.position_ids.device)
            init.copy_(module.position_ids, positions.expand((1, -1)))

    @classmethod
    def from_pretrained(cls, *args, config=None, **kwargs) -> "Self":
        named = cls._named_by(config)
        if named is not cls:
            return named.from_pretrained(*args, config=config, **kwargs)
        return super().from_pretrained(*args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        return super(MadtpBlipPreTrainedModel, cls._named_by(config))._from_config(config, **kwargs)

    @classmethod
    def _named_by(cls, config) -> type["MadtpBlipPreTrainedModel"]:
        """Return the class that a configuration names, or this one.

        `AutoModel` keeps one model class per configuration class, and asks it for models of all tasks.
        """
        names = {*(getattr(config, "architectures", None) or ())}
        names.add((getattr(config, "auto_map", None) or {}).get("AutoModel", "").rpartition(".")[2])
        tasks = [task for task in MadtpBlipPreTrainedModel.__subclasses__() if task.__name__ in names]
        return cls if not tasks or issubclass(cls, tasks[0]) else tasks[0]

    @classmethod
    def from_blip(cls, source: PreTrainedModel | str | Path, **config_overrides) -> "Self":
        """Create a model of this class from transformers' BLIP for the same task. Only alignment parameters are new.

        transformers has no BLIP for NLVR2. Its source is a BLIP for retrieval or question answering, and the
        parameters that only NLVR2 has are new as well.

        Args:
            source (`PreTrainedModel` or `str`):
                The BLIP model, whose weights are copied, or a path or Hub id to load it from. A model of this class
                works too.
            config_overrides:
                Fields of [`MadtpBlipConfig`] to set. With a path or Hub id, also arguments of `from_pretrained`:
                `dtype`, `revision`, `token`, ...

        Raises:
            TypeError: if the source is a model other than this task's BLIP, or an override is neither a field nor such
            an argument.
        """
        return cls.from_dense(source, **config_overrides)

    def as_pipeline(self, processor, **kwargs) -> Pipeline:
        """Wrap this model in the pipeline that its checkpoints ship.

        For example: `model.as_pipeline(processor)(image=..., question=...)`.
        """
        from .pipeline_madtp_blip import PIPELINES

        task, _ = self._task_pipeline
        parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
        return PIPELINES[task](model=self, task=task, device=self.device, **parts, **kwargs)

    def get_input_embeddings(self):
        return self.text_encoder.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.text_encoder.embeddings.word_embeddings = value

    def get_output_embeddings(self):
        # Only tasks that generate have them. peft needs them to leave the tied head out of the layers it adapts.
        return self.text_decoder.get_output_embeddings() if hasattr(self, "text_decoder") else None

    def set_output_embeddings(self, new_embeddings):
        self.text_decoder.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args, **kwargs):
        """Resize the token embeddings as transformers does, and the decoder's embeddings and head along with them."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        decoder = getattr(self, "text_decoder", None)
        if decoder is not None:
            if decoder.get_input_embeddings() is not embeddings:
                decoder.resize_token_embeddings(*args, **kwargs)
            decoder.resize_head(self.config.text_config.vocab_size)
            self.tie_weights()
        return embeddings

    def _encode_images(
        self, pixel_values, with_feature=False, interpolate_pos_encoding=False, pruning=None, **outputs
    ) -> BranchOutput:
        """Encode pixel_values (B, 3, H, W); `pruning` is the pass's, `outputs` are further vision model arguments."""
        pruning = pruning or self.start_pass()
        outputs["method"] = self.make_method(pruning, "vision", with_feature)
        return pruning.encode("vision", self.vision_model, pixel_values, interpolate_pos_encoding, **outputs)

    def _images(self, pixel_values, image_embeds, image_mask, **options) -> BranchOutput:
        """Encode pixel_values, or take images that were encoded before: image_embeds (B, M, D), image_mask (B, M)."""
        if (pixel_values is None) == (image_embeds is None):
            given = "neither" if image_embeds is None else "both"
            raise ValueError(f"{given.capitalize()} of pixel_values and image_embeds: expected one of them.")
        if image_embeds is None:
            return self._encode_images(pixel_values, **options)
        width = self.config.vision_config.hidden_size
        if image_embeds.ndim != 3 or image_embeds.shape[2] != width:
            raise ValueError(
                f"image_embeds has shape {tuple(image_embeds.shape)}: expected (batch_size, length, {width}), the"
                " `last_hidden_state` of model.vision_model(pixel_values)."
            )
        if image_mask is not None and image_mask.shape != image_embeds.shape[:2]:
            raise ValueError(
                f"image_mask has shape {tuple(image_mask.shape)} and image_embeds {tuple(image_embeds.shape)}:"
                f" expected {tuple(image_embeds.shape[:2])}, the `attention_mask` of model.vision_model(pixel_values)."
            )
        return BranchOutput(*unpad(image_embeds, image_mask), None, None)

    def _encode_text(
        self, input_ids, attention_mask, *images, with_feature=False, pruning=None, **outputs
    ) -> BranchOutput:
        """Encode texts (B, L) into a `BranchOutput`.

        images: the states and the layout of each image for cross-attention, one after the other; none for text only.
        """
        pruning = pruning or self.start_pass()
        mask = None
        if attention_mask is not None:
            check_same_shape("attention_mask", attention_mask, input_ids)
            input_ids, mask = left_align(input_ids, attention_mask.bool())
            # On a CPU only: on other devices, reading values would synchronize.
            if takes_chunks(input_ids.device) and pruning.granularity != "frozen":
                mask = None if min(text_lengths(input_ids, mask)) == mask.shape[1] else mask
        if images and self.config.encoder_token_id is not None:
            input_ids = F.pad(input_ids[:, 1:], (1, 0), value=self.config.encoder_token_id)
        method = self.make_method(pruning, "text", with_feature)
        outputs |= {"images": images, "mask": mask, "layout": pruning.text_layout, "method": method}
        return pruning.encode("text", self.text_encoder, input_ids, **outputs)

    def _generation_config(self, given: GenerationConfig | None) -> GenerationConfig:
        """Return a copy of the given generation configuration, or of the model's own.

        Generation ends at [SEP] unless the configuration sets another end token.
        """
        text_config = self.config.text_config
        config = copy.deepcopy(self.generation_config if given is None else given)
        if (given is None and config.eos_token_id in (None, text_config.eos_token_id)) or config.eos_token_id is None:
            config.eos_token_id = text_config.sep_token_id
        config.bos_token_id, config.pad_token_id = text_config.bos_token_id, text_config.pad_token_id
        return config

    def _generate(self, input_ids, encoded: BranchOutput, masked: bool, **generate_kwargs) -> torch.LongTensor:
        """Continue input_ids (B, L) conditioned on the encoder's hidden states; unless `masked`, padding included."""
        generation_config = self._generation_config(generate_kwargs.pop("generation_config", None))
        generate_kwargs.pop("token_type_ids", None)  # tokenizers return them, BLIP has none

        def setting(name):
            """Return a setting as `generate` resolves it: the argument, else the configuration's field."""
            value = generate_kwargs.get(name)
            return getattr(generation_config, name, None) if value is None else value

        if setting("output_attentions"):
            self._warn_of_maps()
        if "past_key_values" in generate_kwargs:  # the name depends on transformers' version
            generate_kwargs[CACHE_ARGUMENT] = generate_kwargs.pop("past_key_values")
        kind, assistant = setting("cache_implementation"), generate_kwargs.get("assistant_model")
        if kind not in (None, "dynamic", "offloaded", "hybrid"):
            raise ValueError(
                f"cache_implementation={kind!r}: BLIP's decoder does not support it, nor does transformers'."
                ' Expected "dynamic", which caches as it grows, or "offloaded".'
            )
        if assistant is not None and not isinstance(assistant, TextDecoder):
            raise ValueError(
                f"assistant_model is a {type(assistant).__name__}: expected the `text_decoder` of a model of this"
                " class, which cross-attends to this model's encoder states."
            )
        states = None
        if setting("use_cache") is not False and generate_kwargs.get(CACHE_ARGUMENT) is None:
            generate_kwargs["use_cache"] = True
            if TAKES_FINISHED_MASKS:
                # With keys and values cached, states are not read. One per sample is enough: `generate` would repeat
                # all of them for each beam.
                states = encoded.first_states.unsqueeze(1)
            words = DynamicCache(offloading=True) if kind == "offloaded" else DynamicCache()
            images = cross_attention_cache(self.text_decoder, encoded.states, encoded.sequences)
            generate_kwargs[CACHE_ARGUMENT] = EncoderDecoderCache(words, images)
        generate_kwargs = generation_config.update(**generate_kwargs)  # returns the arguments that are not fields
        generation_config.cache_implementation = None  # the cache exists already
        return self.text_decoder.generate(
            input_ids=input_ids,
            generation_config=generation_config,
            encoder_hidden_states=encoded.hidden_states if states is None else states,
            encoder_attention_mask=cross_attention_mask(encoded.mask) if masked else None,
            **generate_kwargs,
        )


def images_for_texts(vision: BranchOutput, texts: torch.Tensor, kind: str) -> tuple[torch.Tensor, Sequences]:
    """Return the states and layout of each text's image; a single image is repeated for all texts."""
    number = vision.sequences.batch_size
    if number != 1 or texts.shape[0] == 1:
        check_same_number(number, texts.shape[0], kind)
        return vision.states, vision.sequences
    sequences = Sequences.padded(texts.shape[0], vision.sequences.max_seqlen, vision.states.device)
    return vision.states.repeat(texts.shape[0], 1), sequences


def one_text_for_all(input_ids, attention_mask, num_images: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Expand a single text to each of several images; return other batches unchanged."""
    if input_ids.shape[0] != 1 or num_images == 1:
        return input_ids, attention_mask
    mask = None if attention_mask is None else attention_mask.expand(num_images, -1)
    return input_ids.expand(num_images, -1), mask


__all__ = ["MadtpBlipPreTrainedModel"]
