"""Configuration fields of token pruning, shared by all model families."""

import itertools
import math
from collections.abc import Sequence

from transformers.utils import logging

from .versions import VERSION, warn_if_untested


# A checkpoint's configuration is imported before its other code, so the warning precedes imports that another version
# of transformers may lack.
warn_if_untested()
logger = logging.get_logger("transformers.models.madtp")

MODALITIES = ("vision", "text")
# Output fields of pruning, which `Trainer` leaves out of its predictions.
PRUNING_OUTPUTS = ("task_loss", "alignment_loss", "vision_tokens", "text_tokens", "image_mask", "vision_positions")
GRANULARITIES = ("instance", "batch", "frozen")


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_setting(setting) -> bool:
    """Return whether this is a method's setting: a dict of numbers, of which those of MADTP are within bounds."""
    return (
        isinstance(setting, dict)
        and len(setting) > 0
        and all(isinstance(key, str) and is_number(number) for key, number in setting.items())
        and setting.get("temperature", 1.0) > 0
        and 0 < setting.get("factor", 1.0) <= 1.25
    )


def _is_schedule(schedule) -> bool:
    return (
        isinstance(schedule, list)
        and len(schedule) > 0
        and all(_is_setting(entry) and len(entry) > 1 and 0 < entry.get("reduction", 0) < 1 for entry in schedule)
        and all(low["reduction"] < high["reduction"] for low, high in itertools.pairwise(schedule))
    )


def _named(entries, *names: str):
    """Return entries as dicts; version 0.1.0 wrote lists, in which the factor, the last number, may be missing."""
    if not isinstance(entries, (list, tuple)):
        return entries
    lengths = (len(names) - 1, len(names))
    return [
        {"factor": 1.0, **dict(zip(names, entry))}
        if isinstance(entry, (list, tuple)) and len(entry) in lengths
        else entry
        for entry in entries
    ]


def _setting_of(entry: dict) -> dict:
    """Return the setting in an entry of the schedule or of the token counts."""
    return {name: value for name, value in entry.items() if name not in ("reduction", *MODALITIES)}


def _are_token_counts(counts, num_layers: tuple[int, int], least: tuple[int, int]) -> bool:
    def is_branch(branch, number, fewest):
        return (
            isinstance(branch, (list, tuple))
            and len(branch) == number
            and all(is_count(n) and n >= fewest for n in branch)
        )

    return isinstance(counts, list) and all(
        isinstance(entry, dict)
        and _is_setting(_setting_of(entry))
        and all(map(is_branch, (entry.get(modality) for modality in MODALITIES), num_layers, least))
        for entry in counts
    )


# For each field: a check of its value, and the expected values for the error message.
_CHECKS = {
    "num_alignment_tokens": (is_count, "a whole number of at least 1"),
    "alignment_dim": (lambda value: value is None or is_count(value), "a whole number or None"),
    "alignment_loss_weight": (lambda value: is_number(value) and value >= 0, "a finite number of at least 0"),
    "pruning_method": (lambda value: isinstance(value, str) and value != "", "the name of a pruning method"),
    "pruning_setting": (
        lambda value: value is None or _is_setting(value),
        "None to switch pruning off, or the numbers of the method's setting by name, temperature > 0,"
        " 0 < factor <= 1.25",
    ),
    "distillation_weight": (lambda value: is_number(value) and value >= 0, "a finite number of at least 0"),
    "pruning_temperature": (
        lambda value: is_number(value) and value >= 0,
        "a finite number, 0 to switch pruning off or larger to prune more",
    ),
    "pruning_modalities": (
        lambda value: isinstance(value, (list, tuple)) and set(value) <= set(MODALITIES),
        f"a tuple of some of {', '.join(MODALITIES)}",
    ),
    "pruning_layers": (lambda value: value is None or is_count(value), "a whole number of at least 1, or None"),
    "pruning_granularity": (lambda value: value in GRANULARITIES, f"one of {', '.join(GRANULARITIES)}"),
    "pruning_schedule": (
        lambda value: value is None or _is_schedule(value),
        'None or entries {"reduction": ..., and the setting that reaches it} in order of reduction, 0 < reduction < 1,'
        " temperature > 0, 0 < factor <= 1.25",
    ),
}


class PruningConfigMixin:
    """Mixin that adds the fields of token pruning and checks them when they are set, not in the forward pass.

    A family's configuration derives from this mixin and from a `PreTrainedConfig` with `vision_config` and
    `text_config`, and defines `__init__(self, **kwargs)`, which calls that of the mixin. See `MadtpBlipConfig` for the
    fields.
    """

    # The fewest tokens that a layer of the vision and of the text branch can leave: the protected ones, those that
    # have to stay, and the merged one.
    _least_token_counts = (3, 3)

    def __init__(
        self,
        num_alignment_tokens: int = 100,
        alignment_dim: int | None = None,
        alignment_loss_weight: float = 0.1,
        distillation_weight: float = 1.0,
        pruning_method: str = "madtp",
        pruning_setting: dict[str, float] | None = None,
        pruning_temperature: float | None = None,
        pruning_modalities: Sequence[str] = MODALITIES,
        pruning_layers: int | None = None,
        pruning_granularity: str = "instance",
        pruning_schedule: list[dict[str, float]] | None = None,
        pruning_token_counts: list[dict] | None = None,
        madtp_version: str | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        # A configuration is always saved with the current code.
        self.madtp_version = VERSION
        self.num_alignment_tokens = num_alignment_tokens
        self.alignment_dim = alignment_dim
        self.alignment_loss_weight = alignment_loss_weight
        self.distillation_weight = distillation_weight
        self.pruning_method = pruning_method
        self.pruning_modalities = pruning_modalities
        self.pruning_layers = pruning_layers
        self.pruning_schedule = pruning_schedule
        self.pruning_token_counts = pruning_token_counts
        self.pruning_granularity = pruning_granularity
        self.pruning_setting = pruning_setting
        if pruning_temperature is not None and pruning_temperature != self.pruning_temperature:
            self.pruning_temperature = pruning_temperature
        if pruning_granularity == "frozen" and self.pruning_temperature > 0:
            self.token_counts()

    @property
    def pruning_temperature(self) -> float:
        """The temperature in `pruning_setting`, 0 if there is none. Setting it sets MADTP's setting."""
        return (self.pruning_setting or {}).get("temperature", 0.0)

    @pruning_temperature.setter
    def pruning_temperature(self, value: float) -> None:
        present = self.pruning_setting if self.pruning_temperature else {"factor": 1.0}
        self.pruning_setting = {**present, "temperature": value} if value > 0 else None

    @property
    def calibrated_reductions(self) -> list[float]:
        """The reductions in `pruning_schedule`, [] without one."""
        return [entry["reduction"] for entry in self.pruning_schedule or ()]

    def to_dict(self) -> dict:
        fields = super().to_dict()
        if self.pruning_method in ("madtp", "madtp_merge", "class_attention"):
            fields["pruning_temperature"] = self.pruning_temperature
        return fields

    def __setattr__(self, name, value):
        if name == "pruning_modalities" and isinstance(value, list):
            value = tuple(value)  # JSON has no tuples
        elif name == "pruning_schedule":
            value = _named(value, "reduction", "temperature", "factor")
        elif name == "pruning_token_counts":
            value = _named(value, "temperature", "vision", "text", "factor")
        if name in _CHECKS:
            accepts, expected = _CHECKS[name]
            if not accepts(value):
                raise ValueError(f"{name}={value!r}: expected {expected}.")
        elif name == "pruning_token_counts" and value is not None:
            layers = (self.vision_config.num_hidden_layers, self.text_config.num_hidden_layers)
            least = self._least_token_counts
            if not _are_token_counts(value, layers, least):
                raise ValueError(
                    f'pruning_token_counts={value!r}: expected None or entries {{"vision": {layers[0]} counts, "text":'
                    f" {layers[1]} counts, and the setting that they belong to}}, each count at least {least[0]} for"
                    f" vision and {least[1]} for text."
                )
        if name == "pruning_layers" and value != getattr(self, name, value):
            self.drop_schedule(f"it was calibrated with pruning_layers={getattr(self, name)}")
        super().__setattr__(name, value)

    def drop_schedule(self, reason: str) -> None:
        """Turn pruning off and drop what was calibrated, with a warning that gives the reason."""
        if self.pruning_schedule:
            logger.warning(
                f"The calibrated schedule is dropped, because {reason}. Pruning is off: calibrate again with"
                " madtp_hf.calibrate(model, dataloader, reductions)."
            )
        self.pruning_setting = self.pruning_schedule = self.pruning_token_counts = None

    def token_counts(self, setting: dict | None = None) -> dict[str, tuple[int, ...]] | None:
        """Return how many tokens each layer of either branch leaves; None if granularity is not "frozen".

        setting: the method's setting; defaults to the present one.

        Raises:
            ValueError: if granularity is "frozen" and there are no counts for this setting.
        """
        if self.pruning_granularity != "frozen":
            return None
        present = {"factor": 1.0, **(self.pruning_setting if setting is None else setting)}
        known = [_setting_of(entry) for entry in self.pruning_token_counts or ()]
        for entry, of_entry in zip(self.pruning_token_counts or (), known):
            if all(math.isclose(of_entry.get(name, 1.0), value, rel_tol=1e-9) for name, value in present.items()):
                return {modality: tuple(entry[modality]) for modality in MODALITIES}

        def named(setting):
            first = sorted(setting.items(), key=lambda item: item[0] == "factor")  # named last, and not if it is 1
            return " with ".join(f"{name} {value}" for name, value in first if (name, value) != ("factor", 1.0))

        raise ValueError(
            f"pruning_granularity='frozen' has no token counts for {named(present)}, only for"
            f" [{', '.join(map(named, known))}]: run"
            " `madtp_hf.calibrate(model, dataloader, reductions, freeze=True)`, and ask for one of its reductions."
        )

    def schedule_entries(self, reduction: float) -> tuple[dict, dict, float]:
        """Return the settings of the schedule's two entries around a reduction, and the share of the way between them.

        Raises:
            ValueError: if the reduction is outside (0, 1) or the schedule's range, or there is no schedule.
        """
        if not is_number(reduction) or not 0 <= reduction < 1:
            raise ValueError(f"reduction={reduction!r}: expected a number in [0, 1), the share of FLOPs to save.")
        if not self.pruning_schedule:
            raise ValueError(
                f"reduction={reduction} needs a calibrated schedule, and this model has none: run"
                " `madtp_hf.calibrate(model, dataloader, reductions)` first, or set a temperature."
            )
        lowest, highest = self.calibrated_reductions[0], self.calibrated_reductions[-1]
        if not lowest <= reduction <= highest:
            raise ValueError(
                f"reduction={reduction} is outside what this model's schedule covers, {lowest} to {highest} (and 0,"
                " off):"
                f" ask for one in there, or run `madtp_hf.calibrate` with {reduction} among its reductions."
            )
        pairs = zip(self.pruning_schedule, self.pruning_schedule[1:] or self.pruning_schedule)
        low, high = next((low, high) for low, high in pairs if low["reduction"] <= reduction <= high["reduction"])
        width = high["reduction"] - low["reduction"]
        share = (reduction - low["reduction"]) / width if width > 0 else 0.0
        return _setting_of(low), _setting_of(high), share
