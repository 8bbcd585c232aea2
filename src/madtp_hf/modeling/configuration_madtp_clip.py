"""Configuration of CLIP with MADTP token pruning."""

from transformers import CLIPConfig

from .configuration_pruning import MODALITIES, PruningConfigMixin
from .versions import VERSION  # noqa: F401 (transformers 5.0 copies what this file imports itself)


class MadtpClipConfig(PruningConfigMixin, CLIPConfig):
    r"""
    A [`CLIPConfig`] and what token pruning adds to it.

    Args:
        num_alignment_tokens (`int`, *optional*, defaults to 100):
            How many alignment tokens the image and the text branch share.
        alignment_dim (`int`, *optional*):
            Their width; the text branch's if not given. Every layer of both branches has a map of its own to it.
        alignment_loss_weight (`float`, *optional*, defaults to 0.1):
            The weight of the alignment loss beside the contrastive one.
        pruning_temperature (`float`, *optional*, defaults to 0.0):
            The temperature of the pruning threshold; 0 is off, larger prunes more. Set it with `model.set_pruning`.
        pruning_modalities (`tuple[str]`, *optional*, defaults to `("vision", "text")`):
            The towers that prune.
        pruning_granularity (`str`, *optional*, defaults to `"instance"`):
            `"instance"`: every image and text keeps a number of tokens of its own, so an output doesn't depend on its batch. `"batch"`,
            for comparison: all keep the largest count in the batch. `"frozen"`: each layer leaves a number of tokens that
            `calibrate(..., freeze=True)` has fixed, so shapes don't depend on the input, as CUDA graphs and exported models need.
        pruning_schedule (`list[list[float]]`, *optional*):
            Pairs of a reduction of FLOPs and the temperature that reaches it, as `calibrate` measures them.
        pruning_token_counts (`list`, *optional*):
            For `"frozen"`: `[temperature, vision, text]` for each temperature of the schedule, where `vision` and `text` are how many
            tokens each layer of the tower leaves, protected ones included.
        madtp_version (`str`, *optional*):
            Which version of this code a saved configuration is of; set to the present one.

    Raises:
        ValueError: where a value is not one of the above.
    """

    model_type = "madtp_clip"
    # What `Trainer` leaves out of its predictions: everything but the similarities and the embeddings.
    keys_to_ignore_at_inference = [
        "text_model_output",
        "vision_model_output",
        "task_loss",
        "alignment_loss",
        "vision_tokens",
        "text_tokens",
        "image_mask",
        "vision_positions",
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
        madtp_version=None,
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
        )


__all__ = ["MadtpClipConfig"]
