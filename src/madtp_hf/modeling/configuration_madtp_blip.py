"""Configuration of BLIP with MADTP token pruning."""

import itertools
import math

from transformers import BlipConfig

from .versions import VERSION, warn_if_untested


# Here, as a checkpoint's configuration is the first of its code that is imported: before what another transformers may not have.
warn_if_untested()

MODALITIES = ("vision", "text")
GRANULARITIES = ("instance", "batch", "frozen")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class MadtpBlipConfig(BlipConfig):
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
        pruning_modalities (`tuple[str]`, *optional*, defaults to `("vision", "text")`):
            The encoders that prune.
        pruning_granularity (`str`, *optional*, defaults to `"instance"`):
            `"instance"`: every sample keeps a number of tokens of its own, so an output doesn't depend on its batch. `"batch"`, for
            comparison: all samples keep as many as the neediest of the batch. `"frozen"`: each layer leaves a number of tokens that
            `calibrate(..., freeze=True)` has fixed, so shapes don't depend on the input, as CUDA graphs and exported models need.
        pruning_schedule (`list[list[float]]`, *optional*):
            Pairs of a reduction of FLOPs and the temperature that reaches it, as `calibrate` measures them.
        pruning_token_counts (`list`, *optional*):
            For `"frozen"`: `[temperature, vision, text]` for each temperature of the schedule, where `vision` and `text` are how many tokens
            each layer of the branch leaves, class token included.
        encoder_token_id (`int`, *optional*):
            If given, the model puts this token in the place of a text's first where the text meets an image, as the original BLIP does.
        madtp_version (`str`, *optional*):
            Which version of this code a saved configuration is of; set to the present one.

    Raises:
        ValueError: where a value is not one of the above.
    """

    model_type = "madtp_blip"
    # What `Trainer` leaves out of its predictions: everything but the logits, or retrieval's scores.
    keys_to_ignore_at_inference = [
        "image_embeds",
        "last_hidden_state",
        "hidden_states",
        "attentions",
        "task_loss",
        "alignment_loss",
        "vision_tokens",
        "text_tokens",
        "image_mask",
        "question_states",
        "question_mask",
        "vision_positions",
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
        **kwargs,
    ):
        super().__init__(**kwargs)
        # Of the code that goes with what is saved next; the argument is that of what was saved before.
        self.madtp_version = VERSION
        self.num_alignment_tokens = num_alignment_tokens
        self.alignment_dim = alignment_dim
        self.alignment_loss_weight = alignment_loss_weight
        self.pruning_temperature = pruning_temperature
        # JSON knows no tuples.
        self.pruning_modalities = (
            tuple(pruning_modalities) if isinstance(pruning_modalities, list) else pruning_modalities
        )
        self.pruning_granularity = pruning_granularity
        self.pruning_schedule = pruning_schedule
        self.pruning_token_counts = pruning_token_counts
        self.encoder_token_id = encoder_token_id
        self.check_pruning()

    def check_pruning(self) -> None:
        """Raise a `ValueError` naming the first field of the pruning configuration that can't be used as it is."""

        def require(condition, name, expected):
            if not condition:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}.")

        def is_count(value):
            return isinstance(value, int) and not isinstance(value, bool) and value > 0

        require(is_count(self.num_alignment_tokens), "num_alignment_tokens", "a whole number of at least 1")
        require(self.alignment_dim is None or is_count(self.alignment_dim), "alignment_dim", "a whole number or None")
        weight, temperature = self.alignment_loss_weight, self.pruning_temperature
        require(_is_number(weight) and weight >= 0, "alignment_loss_weight", "a finite number of at least 0")
        require(
            _is_number(temperature) and temperature >= 0,
            "pruning_temperature",
            "a finite number, 0 to switch pruning off or larger to prune more",
        )
        require(
            isinstance(self.pruning_modalities, (list, tuple)) and set(self.pruning_modalities) <= set(MODALITIES),
            "pruning_modalities",
            f"a tuple of some of {', '.join(MODALITIES)}",
        )
        require(self.pruning_granularity in GRANULARITIES, "pruning_granularity", f"one of {', '.join(GRANULARITIES)}")
        require(
            self.encoder_token_id is None
            or (isinstance(self.encoder_token_id, int) and 0 <= self.encoder_token_id < self.text_config.vocab_size),
            "encoder_token_id",
            f"None or a token id below the vocabulary's size, {self.text_config.vocab_size}",
        )
        schedule = self.pruning_schedule
        require(
            schedule is None
            or (
                isinstance(schedule, (list, tuple))
                and len(schedule) > 0
                and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in schedule)
                and all(_is_number(number) for pair in schedule for number in pair)
                and all(0 < reduction < 1 and temperature > 0 for reduction, temperature in schedule)
                and all(low[0] < high[0] for low, high in itertools.pairwise(schedule))
            ),
            "pruning_schedule",
            "None or pairs [reduction, temperature] in order of reduction, 0 < reduction < 1, temperature > 0",
        )

        counts = self.pruning_token_counts
        layers = (self.vision_config.num_hidden_layers, self.text_config.num_hidden_layers)
        require(
            counts is None
            or (
                isinstance(counts, (list, tuple))
                and all(
                    isinstance(entry, (list, tuple))
                    and len(entry) == 3
                    and _is_number(entry[0])
                    and all(
                        isinstance(branch, (list, tuple))
                        and len(branch) == number
                        and all(is_count(count) and count >= 3 for count in branch)
                        for branch, number in zip(entry[1:], layers)
                    )
                    for entry in counts
                )
            ),
            "pruning_token_counts",
            f"None or entries [temperature, {layers[0]} vision counts, {layers[1]} text counts], each count at least 3",
        )
        if self.pruning_granularity == "frozen" and temperature > 0:
            self.token_counts()

    def token_counts(self) -> dict[str, tuple[int, ...]] | None:
        """How many tokens each layer of either branch leaves at the present temperature, where that is fixed; None where it isn't.

        Raises:
            ValueError: if granularity is "frozen" and no counts belong to this temperature.
        """
        if self.pruning_granularity != "frozen":
            return None
        for temperature, vision, text in self.pruning_token_counts or ():
            if math.isclose(temperature, self.pruning_temperature, rel_tol=1e-9):
                return {"vision": tuple(vision), "text": tuple(text)}
        known = [entry[0] for entry in self.pruning_token_counts or ()]
        raise ValueError(
            f"pruning_granularity='frozen' has no token counts for temperature {self.pruning_temperature}, only for {known}: run"
            " `madtp_hf.calibrate(model, dataloader, reductions, freeze=True)`, and ask for one of its reductions."
        )

    def temperature_for(self, reduction: float) -> float:
        """The temperature that reaches a reduction of FLOPs, by the calibrated schedule; geometric in between its entries.

        Raises:
            ValueError: for a reduction outside [0, 1), one that the schedule does not cover, or without a schedule.
        """
        if not _is_number(reduction) or not 0 <= reduction < 1:
            raise ValueError(f"reduction={reduction!r}: expected a number in [0, 1), the share of FLOPs to save.")
        if reduction == 0:
            return 0.0
        if not self.pruning_schedule:
            raise ValueError(
                f"reduction={reduction} needs a calibrated schedule, and this model has none: run"
                " `madtp_hf.calibrate(model, dataloader, reductions)` first, or set a temperature."
            )
        lowest, highest = self.pruning_schedule[0][0], self.pruning_schedule[-1][0]
        if not lowest <= reduction <= highest:
            raise ValueError(
                f"reduction={reduction} is outside what this model's schedule covers, {lowest} to {highest} (and 0, off):"
                f" ask for one in there, or run `madtp_hf.calibrate` with {reduction} among its reductions."
            )
        for (low, low_temperature), (high, high_temperature) in zip(
            self.pruning_schedule, self.pruning_schedule[1:] or self.pruning_schedule
        ):
            if low <= reduction <= high:
                share = (reduction - low) / (high - low) if high > low else 0.0
                return low_temperature ** (1 - share) * high_temperature**share


__all__ = ["MadtpBlipConfig"]
