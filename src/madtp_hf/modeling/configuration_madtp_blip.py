"""Configuration of BLIP with MADTP token pruning."""

from transformers import BlipConfig

from .configuration_pruning import MODALITIES, PRUNING_OUTPUTS, PruningConfigMixin
from .versions import VERSION  # noqa: F401 (transformers 5.0 copies what this file imports itself)


class MadtpBlipConfig(PruningConfigMixin, BlipConfig):
    r"""
    A [`BlipConfig`] and what token pruning adds to it.

    Args:
        num_alignment_tokens (`int`, *optional*, defaults to 100):
            How many alignment tokens the image and the text branch share.
        alignment_dim (`int`, *optional*):
            Their width; the text branch's if not given. A branch of another width is mapped to it.
        alignment_loss_weight (`float`, *optional*, defaults to 0.1):
            The weight of the alignment loss beside the task's.
        pruning_temperature (`float`, *optional*, defaults to 0.0):
            The temperature of the pruning threshold; 0 is off, larger prunes more. Set it with `model.set_pruning`.
        pruning_threshold_factor (`float`, *optional*, defaults to 1.0):
            What the pruning threshold is multiplied by, in (0, 1]: below 1 it prunes less than at any temperature. Set
            it with `model.set_pruning`.
        pruning_modalities (`tuple[str]`, *optional*, defaults to `("vision", "text")`):
            The encoders that prune.
        pruning_granularity (`str`, *optional*, defaults to `"instance"`):
            `"instance"`: every sample keeps a number of tokens of its own, so an output doesn't depend on its batch.
            `"batch"`, for comparison: all samples keep as many as the largest count in the batch. `"frozen"`: each
            layer leaves a number of tokens that `calibrate(..., freeze=True)` has fixed, so shapes don't depend on the
            input, as CUDA graphs and exported models need.
        pruning_schedule (`list[list[float]]`, *optional*):
            `[reduction, temperature]` or `[reduction, temperature, factor]`: a reduction of FLOPs and what reaches it,
            as `calibrate` measures them. Without a factor, it is 1.
        pruning_token_counts (`list`, *optional*):
            For `"frozen"`: `[temperature, vision, text]` for each temperature of the schedule, where `vision` and
            `text` are how many tokens each layer of the branch leaves, class token included; the factor stands behind
            them where it isn't 1.
        encoder_token_id (`int`, *optional*):
            If given, the model puts this token in the place of a text's first where the text meets an image, as the
            original BLIP does.
        madtp_version (`str`, *optional*):
            Which version of this code a saved configuration is of; set to the present one.

    Raises:
        ValueError: where a value is not one of the above.
    """

    model_type = "madtp_blip"
    # What `Trainer` leaves out of its predictions: everything but the logits, or retrieval's scores.
    keys_to_ignore_at_inference = [
        *PRUNING_OUTPUTS,
        "image_embeds",
        "last_hidden_state",
        "hidden_states",
        "attentions",
        "question_states",
        "question_mask",
        "text_states",
        "question_embeds",
        "text_mask",
        "image_feature",
        "text_feature",
        "contrastive_loss",
        "matching_loss",
    ]
    # Saved configurations bring their code along, see `PreTrainedConfig.register_for_auto_class`.
    _auto_class = "AutoConfig"

    def __init__(
        self,
        num_alignment_tokens=100,
        alignment_dim=None,
        alignment_loss_weight=0.1,
        pruning_temperature=0.0,
        pruning_modalities=MODALITIES,
        pruning_granularity="instance",
        pruning_schedule=None,
        pruning_token_counts=None,
        encoder_token_id=None,
        madtp_version=None,
        pruning_threshold_factor=1.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.set_pruning_fields(
            num_alignment_tokens,
            alignment_dim,
            alignment_loss_weight,
            pruning_temperature,
            pruning_modalities,
            pruning_granularity,
            pruning_schedule,
            pruning_token_counts,
            pruning_threshold_factor,
        )
        self.encoder_token_id = encoder_token_id

    def __setattr__(self, name, value):
        if name == "encoder_token_id" and value is not None:
            size = self.text_config.vocab_size
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < size:
                raise ValueError(
                    f"encoder_token_id={value!r}: expected None or a token id below the vocabulary's size, {size}."
                )
        super().__setattr__(name, value)


__all__ = ["MadtpBlipConfig"]
