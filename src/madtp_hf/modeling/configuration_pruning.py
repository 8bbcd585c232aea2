"""What token pruning adds to a configuration, whatever the family of models."""

import itertools
import math

from .versions import VERSION, warn_if_untested


# Here, as a checkpoint's configuration is the first of its code that is imported: before what another transformers may not have.
warn_if_untested()

MODALITIES = ("vision", "text")
# What pruning adds to outputs, which `Trainer` leaves out of its predictions.
PRUNING_OUTPUTS = ("task_loss", "alignment_loss", "vision_tokens", "text_tokens", "image_mask", "vision_positions")
GRANULARITIES = ("instance", "batch", "frozen")


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_schedule(schedule) -> bool:
    return (
        isinstance(schedule, (list, tuple))
        and len(schedule) > 0
        and all(isinstance(entry, (list, tuple)) and len(entry) >= 2 for entry in schedule)
        and all(is_number(number) for entry in schedule for number in entry)
        and all(0 < entry[0] < 1 and entry[1] > 0 for entry in schedule)
        and all(low[0] < high[0] for low, high in itertools.pairwise(schedule))
    )


def _are_token_counts(counts, num_layers: tuple[int, int]) -> bool:
    def is_branch(branch, number):
        return (
            isinstance(branch, (list, tuple)) and len(branch) == number and all(is_count(n) and n >= 3 for n in branch)
        )

    return isinstance(counts, (list, tuple)) and all(
        isinstance(entry, (list, tuple))
        and len(entry) == 3
        and is_number(entry[0])
        and all(is_branch(branch, number) for branch, number in zip(entry[1:], num_layers))
        for entry in counts
    )


# Each field: whether a value can be used, and what is expected.
_CHECKS = {
    "num_alignment_tokens": (is_count, "a whole number of at least 1"),
    "alignment_dim": (lambda value: value is None or is_count(value), "a whole number or None"),
    "alignment_loss_weight": (lambda value: is_number(value) and value >= 0, "a finite number of at least 0"),
    "pruning_temperature": (
        lambda value: is_number(value) and value >= 0,
        "a finite number, 0 to switch pruning off or larger to prune more",
    ),
    "pruning_modalities": (
        lambda value: isinstance(value, (list, tuple)) and set(value) <= set(MODALITIES),
        f"a tuple of some of {', '.join(MODALITIES)}",
    ),
    "pruning_granularity": (lambda value: value in GRANULARITIES, f"one of {', '.join(GRANULARITIES)}"),
    "pruning_schedule": (
        lambda value: value is None or _is_schedule(value),
        "None or entries [reduction, temperature] in order of reduction, 0 < reduction < 1, temperature > 0",
    ),
}


class PruningConfigMixin:
    """Fields of token pruning, checked when they are set, so that no forward pass has to.

    For a `PreTrainedConfig` with `vision_config` and `text_config`, whose `__init__` calls `set_pruning_fields` after its base's.
    """

    def set_pruning_fields(
        self,
        num_alignment_tokens=100,
        alignment_dim=None,
        alignment_loss_weight=0.1,
        pruning_temperature=0.0,
        pruning_modalities=MODALITIES,
        pruning_granularity="instance",
        pruning_schedule=None,
        pruning_token_counts=None,
    ) -> None:
        # Of the code that goes with what is saved next.
        self.madtp_version = VERSION
        self.num_alignment_tokens = num_alignment_tokens
        self.alignment_dim = alignment_dim
        self.alignment_loss_weight = alignment_loss_weight
        self.pruning_modalities = pruning_modalities
        self.pruning_schedule = pruning_schedule
        self.pruning_token_counts = pruning_token_counts
        self.pruning_granularity = pruning_granularity
        self.pruning_temperature = pruning_temperature
        if pruning_granularity == "frozen" and pruning_temperature > 0:
            self.token_counts()

    def __setattr__(self, name, value):
        if name == "pruning_modalities" and isinstance(value, list):
            value = tuple(value)  # JSON knows no tuples
        if name in _CHECKS:
            accepts, expected = _CHECKS[name]
            if not accepts(value):
                raise ValueError(f"{name}={value!r}: expected {expected}.")
        elif name == "pruning_token_counts" and value is not None:
            layers = (self.vision_config.num_hidden_layers, self.text_config.num_hidden_layers)
            if not _are_token_counts(value, layers):
                raise ValueError(
                    f"pruning_token_counts={value!r}: expected None or entries [temperature, {layers[0]} vision counts, {layers[1]} text"
                    " counts], each count at least 3."
                )
        super().__setattr__(name, value)

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
        if not is_number(reduction) or not 0 <= reduction < 1:
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
        for low, high in zip(self.pruning_schedule, self.pruning_schedule[1:] or self.pruning_schedule):
            if low[0] <= reduction <= high[0]:
                share = (reduction - low[0]) / (high[0] - low[0]) if high[0] > low[0] else 0.0
                return low[1] ** (1 - share) * high[1] ** share
