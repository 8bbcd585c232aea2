"""Configuration of CLIP with MADTP token pruning."""

from transformers import CLIPConfig

from .configuration_pruning import MODALITIES, PRUNING_OUTPUTS, PruningConfigMixin
from .versions import VERSION  # noqa: F401 (transformers 5.0 copies what this file imports itself)


class MadtpClipConfig(PruningConfigMixin, CLIPConfig):
    r"""
    A [`CLIPConfig`] and what token pruning adds to it.

    Args:
        num_alignment_tokens (`int`, *optional*, defaults to 100): How many alignment tokens the towers share.
        alignment_dim (`int`, *optional*): Their width, to which every layer has a map; the text tower's if not given.
        alignment_loss_weight (`float`, *optional*, defaults to 0.1): The weight of the alignment loss.
        pruning_temperature (`float`, *optional*, defaults to 0.0): Of the threshold; 0 is off, larger prunes more.
        pruning_threshold_factor (`float`, *optional*, defaults to 1.0): Of the threshold; less than 1 prunes less.
        pruning_modalities (`tuple[str]`, *optional*, defaults to `("vision", "text")`): The towers that prune.
        pruning_granularity (`str`, *optional*, defaults to `"instance"`):
            `"instance"`: an image or a text keeps a number of tokens of its own; `"batch"`, for comparison: the
            largest in the batch; `"frozen"`: what `calibrate(..., freeze=True)` has fixed.
        pruning_schedule (`list[list[float]]`, *optional*): Reductions and what reaches them, as `calibrate` finds.
        pruning_token_counts (`list`, *optional*): For `"frozen"`: how many tokens each layer leaves.
        madtp_version (`str`, *optional*): Which version of this code a saved configuration is of.

    Raises:
        ValueError: where a value is not one of the above.
    """

    model_type = "madtp_clip"
    # What `Trainer` leaves out of its predictions: everything but the similarities and the embeddings.
    keys_to_ignore_at_inference = ["text_model_output", "vision_model_output", *PRUNING_OUTPUTS]
    _least_token_counts = (4, 5)  # more than one token stays; of a text, the end as well
    _auto_class = "AutoConfig"  # saved configurations bring their code along, see `register_for_auto_class`

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
        pruning_threshold_factor=1.0,
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
            pruning_threshold_factor,
        )


__all__ = ["MadtpClipConfig"]
