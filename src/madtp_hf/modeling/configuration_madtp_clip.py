"""Configuration of CLIP with MADTP token pruning."""

from transformers import CLIPConfig

from .configuration_pruning import PRUNING_OUTPUTS, PruningConfigMixin
from .versions import VERSION  # noqa: F401 (transformers 5.0 copies what this file imports itself)


class MadtpClipConfig(PruningConfigMixin, CLIPConfig):
    r"""
    A [`CLIPConfig`] with the fields of token pruning.

    Args:
        num_alignment_tokens (`int`, *optional*, defaults to 100): The number of shared alignment tokens.
        alignment_dim (`int`, *optional*): Their width, to which each layer projects; defaults to the text tower's.
        alignment_loss_weight (`float`, *optional*, defaults to 0.1): The weight of the alignment loss.
        distillation_weight (`float`, *optional*, defaults to 1.0): As in [`MadtpBlipConfig`].
        pruning_method (`str`, *optional*, defaults to `"madtp"`): How tokens are chosen, see [`MadtpBlipConfig`].
        pruning_setting (`dict[str, float]`, *optional*): How much the method prunes; `None` is off.
        pruning_temperature (`float`, *optional*, defaults to 0.0): The temperature in `pruning_setting`.
        pruning_modalities (`tuple[str]`, *optional*, defaults to `("vision", "text")`): The towers that prune.
        pruning_layers (`int`, *optional*): As in [`MadtpBlipConfig`].
        pruning_granularity (`str`, *optional*, defaults to `"instance"`):
            `"instance"`: every image or text keeps its own number of tokens. `"batch"`, for comparison: each keeps
            the largest count in the batch. `"frozen"`: layers leave what `calibrate(..., freeze=True)` has fixed.
        pruning_schedule (`list[dict]`, *optional*): Reductions and the settings that reach them, from `calibrate`.
        pruning_token_counts (`list[dict]`, *optional*): For `"frozen"`: the number of tokens each layer leaves.
        madtp_version (`str`, *optional*): The version of this code that saved the configuration.

    Raises:
        ValueError: if a field has none of the values above.
    """

    model_type = "madtp_clip"
    # Outputs that `Trainer` leaves out of its predictions: all but the similarities and the embeddings.
    keys_to_ignore_at_inference = ["text_model_output", "vision_model_output", *PRUNING_OUTPUTS]
    _least_token_counts = (4, 5)  # more than one token stays, in texts also the end of text
    _auto_class = "AutoConfig"  # saves the code with a configuration, see `register_for_auto_class`

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)


__all__ = ["MadtpClipConfig"]
