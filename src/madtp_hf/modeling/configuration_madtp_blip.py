"""Configuration of BLIP with MADTP token pruning."""

from transformers import BlipConfig

from .configuration_pruning import PRUNING_OUTPUTS, PruningConfigMixin
from .versions import VERSION  # noqa: F401 (transformers 5.0 copies what this file imports itself)


class MadtpBlipConfig(PruningConfigMixin, BlipConfig):
    r"""
    A [`BlipConfig`] with the fields of token pruning.

    Args:
        num_alignment_tokens (`int`, *optional*, defaults to 100):
            The number of alignment tokens that the image and the text branch share.
        alignment_dim (`int`, *optional*):
            The width of the alignment tokens. Defaults to the text branch's. A branch of another width is projected
            to it.
        alignment_loss_weight (`float`, *optional*, defaults to 0.1):
            The weight of the alignment loss relative to the task loss.
        distillation_weight (`float`, *optional*, defaults to 1.0):
            In training with a dense pass or a teacher (see `madtp_hf.ReductionCallback`), the weight of what pruned
            passes learn from its outputs, relative to the task loss.
        pruning_method (`str`, *optional*, defaults to `"madtp"`):
            How tokens are chosen: `"madtp"`, `"madtp_merge"`, `"class_attention"`, `"evit"`, `"tome"`, `"random"`, or
            the name of a class of your own. Set it with `model.set_pruning_method`.
        pruning_setting (`dict[str, float]`, *optional*):
            How much the method prunes: `{"temperature": ..., "factor": ...}` for MADTP, `"madtp_merge"` and class
            attention, `{"keep_rate": ...}` for EViT and random tokens, `{"r": ...}` for ToMe. `None` switches pruning
            off. Set it with `model.set_pruning`.
        pruning_temperature (`float`, *optional*, defaults to 0.0):
            The temperature in `pruning_setting`: 0 switches pruning off, larger values prune more.
        pruning_modalities (`tuple[str]`, *optional*, defaults to `("vision", "text")`):
            The encoders that prune.
        pruning_layers (`int`, *optional*):
            With MADTP, merging or not, or class attention, how many of the first layers of a branch prune. By default
            all do, as in the paper. Another number drops the setting and the schedule: calibrate again.
        pruning_granularity (`str`, *optional*, defaults to `"instance"`):
            `"instance"`: every sample keeps its own number of tokens, so its output doesn't depend on the batch.
            `"batch"`, for comparison: every sample keeps the largest count in the batch. `"frozen"`: each layer leaves
            the number of tokens that `calibrate(..., freeze=True)` has fixed, so shapes don't depend on the input, as
            CUDA graphs and exported models require.
        pruning_schedule (`list[dict[str, float]]`, *optional*):
            What `calibrate` measures: entries `{"reduction": ...}`, a share of FLOPs, with the setting that saves it.
            The lists of version 0.1.0, `[reduction, temperature]`, are read.
        pruning_token_counts (`list[dict]`, *optional*):
            For `"frozen"`: for each setting of the schedule, an entry of the setting and of lists `"vision"` and
            `"text"`: how many tokens each layer of the branch leaves, protected tokens included.
        encoder_token_id (`int`, *optional*):
            If given, the model replaces the first token of a text by this one for cross-attention to image states, as
            the original BLIP does.
        madtp_version (`str`, *optional*):
            The version of this code that saved the configuration. It is always set to the current version.

    Raises:
        ValueError: if a field has none of the values above.
    """

    model_type = "madtp_blip"
    # Outputs that `Trainer` leaves out of its predictions: all but the logits or the retrieval scores.
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
    # Saving a configuration saves its code along with it, see `PreTrainedConfig.register_for_auto_class`.
    _auto_class = "AutoConfig"

    def __init__(self, encoder_token_id: int | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
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
