"""Configuration fields of token pruning, shared by all model families."""

import itertools
import math

from .versions import VERSION, warn_if_untested


# A checkpoint's configuration is imported before its other code, so the warning precedes imports that another version
# of transformers may lack.
warn_if_untested()

MODALITIES = ("vision", "text")
# Output fields of pruning, which `Trainer` leaves out of its predictions.
PRUNING_OUTPUTS = ("task_loss", "alignment_loss", "vision_tokens", "text_tokens", "image_mask", "vision_positions")
GRANULARITIES = ("instance", "batch", "frozen")


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_factor(value) -> bool:
    return is_number(value) and 0 < value <= 1


def _factor(entry, place: int) -> float:
    """Return the factor at index `place` of an entry, or 1 if the entry is shorter."""
    return entry[place] if len(entry) > place else 1.0


def _is_schedule(schedule) -> bool:
    return (
        isinstance(schedule, (list, tuple))
        and len(schedule) > 0
        and all(isinstance(entry, (list, tuple)) and len(entry) >= 2 for entry in schedule)
        and all(is_number(number) for entry in schedule for number in entry)
        and all(0 < entry[0] < 1 and entry[1] > 0 and _is_factor(_factor(entry, 2)) for entry in schedule)
        and all(low[0] < high[0] for low, high in itertools.pairwise(schedule))
    )


def _are_token_counts(counts, num_layers: tuple[int, int], least: tuple[int, int]) -> bool:
    def is_branch(branch, number, fewest):
        return (
            isinstance(branch, (list, tuple))
            and len(branch) == number
            and all(is_count(n) and n >= fewest for n in branch)
        )

    return isinstance(counts, (list, tuple)) and all(
        isinstance(entry, (list, tuple))
        and len(entry) in (3, 4)
        and is_number(entry[0])
        and _is_factor(_factor(entry, 3))
        and all(map(is_branch, entry[1:3], num_layers, least))
        for entry in counts
    )


# For each field: a check of its value, and the expected values for the error message.
_CHECKS = {
    "num_alignment_tokens": (is_count, "a whole number of at least 1"),
    "alignment_dim": (lambda value: value is None or is_count(value), "a whole number or None"),
    "alignment_loss_weight": (lambda value: is_number(value) and value >= 0, "a finite number of at least 0"),
    "pruning_temperature": (
        lambda value: is_number(value) and value >= 0,
        "a finite number, 0 to switch pruning off or larger to prune more",
    ),
    "pruning_threshold_factor": (_is_factor, "a number in (0, 1], smaller to prune less"),
    "pruning_modalities": (
        lambda value: isinstance(value, (list, tuple)) and set(value) <= set(MODALITIES),
        f"a tuple of some of {', '.join(MODALITIES)}",
    ),
    "pruning_granularity": (lambda value: value in GRANULARITIES, f"one of {', '.join(GRANULARITIES)}"),
    "pruning_schedule": (
        lambda value: value is None or _is_schedule(value),
        "None or entries [reduction, temperature] or [reduction, temperature, factor] in order of reduction, 0 <"
        " reduction < 1,"
        " temperature > 0, 0 < factor <= 1",
    ),
}


class PruningConfigMixin:
    """Mixin that adds the fields of token pruning and checks them when they are set, not in the forward pass.

    It extends a `PreTrainedConfig` with `vision_config` and `text_config`, whose `__init__` calls `set_pruning_fields`
    after that of its base class.
    """

    # The fewest tokens that a layer of the vision and of the text branch can leave: the protected ones, those that
    # have to stay, and the merged one.
    _least_token_counts = (3, 3)

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
        pruning_threshold_factor=1.0,
    ) -> None:
        # A configuration is always saved with the current code.
        self.madtp_version = VERSION
        self.num_alignment_tokens = num_alignment_tokens
        self.alignment_dim = alignment_dim
        self.alignment_loss_weight = alignment_loss_weight
        self.pruning_modalities = pruning_modalities
        self.pruning_schedule = pruning_schedule
        self.pruning_token_counts = pruning_token_counts
        self.pruning_granularity = pruning_granularity
        self.pruning_temperature = pruning_temperature
        self.pruning_threshold_factor = pruning_threshold_factor
        if pruning_granularity == "frozen" and pruning_temperature > 0:
            self.token_counts()

    def __setattr__(self, name, value):
        if name == "pruning_modalities" and isinstance(value, list):
            value = tuple(value)  # JSON has no tuples
        if name in _CHECKS:
            accepts, expected = _CHECKS[name]
            if not accepts(value):
                raise ValueError(f"{name}={value!r}: expected {expected}.")
        elif name == "pruning_token_counts" and value is not None:
            layers = (self.vision_config.num_hidden_layers, self.text_config.num_hidden_layers)
            least = self._least_token_counts
            if not _are_token_counts(value, layers, least):
                raise ValueError(
                    f"pruning_token_counts={value!r}: expected None or entries [temperature, {layers[0]} vision"
                    f" counts, {layers[1]} text"
                    f" counts], each count at least {least[0]} for vision and {least[1]} for text, with the"
                    " threshold's factor behind where"
                    " that isn't 1."
                )
        super().__setattr__(name, value)

    def token_counts(self) -> dict[str, tuple[int, ...]] | None:
        """Return how many tokens each layer of either branch leaves at the current threshold; None if not "frozen".

        Raises:
            ValueError: if granularity is "frozen" and there are no counts for the current temperature and factor.
        """
        if self.pruning_granularity != "frozen":
            return None
        present = (self.pruning_temperature, self.pruning_threshold_factor)
        known = [(entry[0], _factor(entry, 3)) for entry in self.pruning_token_counts or ()]
        for pair, (_, vision, text, *_) in zip(known, self.pruning_token_counts or ()):
            if all(math.isclose(*numbers, rel_tol=1e-9) for numbers in zip(pair, present)):
                return {"vision": tuple(vision), "text": tuple(text)}

        def named(temperature, factor):
            return f"temperature {temperature}" + (f" with factor {factor}" if factor != 1 else "")

        raise ValueError(
            f"pruning_granularity='frozen' has no token counts for {named(*present)}, only for"
            f" [{', '.join(named(*pair) for pair in known)}]: run"
            " `madtp_hf.calibrate(model, dataloader, reductions, freeze=True)`, and ask for one of its reductions."
        )

    def temperature_for(self, reduction: float) -> float:
        """Return the temperature that reaches a reduction, see `threshold_for`."""
        return self.threshold_for(reduction)[0]

    def threshold_for(self, reduction: float) -> tuple[float, float]:
        """Return the temperature and the factor that reach a reduction of FLOPs, by the calibrated schedule.

        Between entries of the schedule, both are interpolated geometrically.

        Raises:
            ValueError: if the reduction is outside [0, 1) or the schedule's range, or there is no schedule.
        """
        if not is_number(reduction) or not 0 <= reduction < 1:
            raise ValueError(f"reduction={reduction!r}: expected a number in [0, 1), the share of FLOPs to save.")
        if reduction == 0:
            return 0.0, 1.0
        if not self.pruning_schedule:
            raise ValueError(
                f"reduction={reduction} needs a calibrated schedule, and this model has none: run"
                " `madtp_hf.calibrate(model, dataloader, reductions)` first, or set a temperature."
            )
        lowest, highest = self.pruning_schedule[0][0], self.pruning_schedule[-1][0]
        if not lowest <= reduction <= highest:
            raise ValueError(
                f"reduction={reduction} is outside what this model's schedule covers, {lowest} to {highest} (and 0,"
                " off):"
                f" ask for one in there, or run `madtp_hf.calibrate` with {reduction} among its reductions."
            )
        for low, high in zip(self.pruning_schedule, self.pruning_schedule[1:] or self.pruning_schedule):
            if low[0] <= reduction <= high[0]:
                share = (reduction - low[0]) / (high[0] - low[0]) if high[0] > low[0] else 0.0
                ends = ((low[1], high[1]), (_factor(low, 2), _factor(high, 2)))
                return tuple(start ** (1 - share) * end**share for start, end in ends)
