"""Steer the pruning threshold to a reduction of FLOPs during training."""

import math

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..calibration import FACTORS, SCAN, measure, threshold_at


NOISE = 0.02  # how far batches differ in their reduction: the gain does not adapt to that
GAINS = (0.02, 12.0)  # the smallest and the largest


class ReductionCallback(TrainerCallback, ExportableState):
    """A `Trainer` callback that keeps the reduction of FLOPs at a target during training.

    After every step the temperature moves, on a logarithmic scale, in proportion to how far the step's measured
    reduction is from the target: an integral controller, so that it settles where the mean reduction is the target,
    whatever the model, data or learning rate, and follows as the model changes. Below a low temperature it is the
    threshold's factor that moves, on the path that `calibrate` searches. How much the reduction answers to a move
    differs a hundredfold along this path, so each target's gain adapts: it grows while the reduction stays on one side
    of the target, and is halved when a move has gone past it. `calibrate` afterwards finds the exact thresholds.

    Between steps, when `Trainer` evaluates and saves, the model is at the threshold of the largest target: evaluations
    compare, and a checkpoint's configuration has it. Training that is resumed goes on with the thresholds of its
    checkpoint. The model may be one of peft's.

    Args:
        target_reduction (`float` or `tuple[float, float]`):
            The share of FLOPs to save, in (0, 1). With a pair, each step draws one of `num_targets` evenly spaced
            targets between the two, each with a threshold of its own, so that one checkpoint learns them all.
        num_targets (`int`, *optional*, defaults to 5):
            How many, with a pair.
        gain (`float`, *optional*):
            By how much the logarithm of the temperature, or of the factor, moves at first for a distance of 1 from the
            target. Defaults to 0.3 where a calibrated schedule says where to begin, else to 1.5.
        seed (`int`, *optional*, defaults to 0):
            Of the draw.
    """

    def __init__(self, target_reduction, num_targets: int = 5, gain: float | None = None, seed: int = 0):
        low, high = target_reduction if isinstance(target_reduction, (tuple, list)) else (target_reduction,) * 2
        if not 0 < low <= high < 1:
            raise ValueError(
                f"target_reduction={target_reduction!r}: expected a number in (0, 1), or a pair of them, the smaller"
                " first."
            )
        if num_targets < 2:
            raise ValueError(f"num_targets={num_targets}: expected at least 2.")
        self.target_reduction = target_reduction
        self.num_targets = num_targets
        self.gain = gain
        self.seed = seed
        self.targets = torch.linspace(low, high, num_targets if low < high else 1).tolist()
        self.first_temperature = None  # of the path, see `threshold_at`
        self.log_temperatures = None  # the points on it: where the factor is below 1, of temperature times factor
        self.gains = None  # one for each target
        self.errors = [0.0] * len(self.targets)
        self._measured = []
        self._hook = None

    def state(self) -> dict:
        """Return the state that a checkpoint stores, so that resumed training continues with it (see
        `ExportableState`)."""
        return {
            "args": {
                "target_reduction": self.target_reduction,
                "num_targets": self.num_targets,
                "gain": self.gain,
                "seed": self.seed,
            },
            "attributes": {
                "first_temperature": self.first_temperature,
                "log_temperatures": self.log_temperatures,
                "gains": self.gains,
                "errors": self.errors,
            },
        }

    def _current(self, step: int) -> int:
        """Return the index of a step's target, drawn from the step's number: the same on every process and after
        resuming."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return int(torch.randint(len(self.targets), (), generator=generator))

    def _measure(self, model, args, kwargs, output) -> None:
        if model.training:
            self._measured.append(measure(model, kwargs, output).mean())

    def _begin(self, config) -> None:
        """Set the search path and the starting points: by the calibrated schedule, else by the present threshold,
        else at a moderate temperature."""
        moderate, schedule = config.text_config.hidden_size**0.5 / 4, config.pruning_schedule or ()
        present = config.pruning_temperature or moderate
        with_factor = [entry[1] for entry in schedule if len(entry) > 2 and entry[2] < 1]
        if config.pruning_temperature and config.pruning_threshold_factor < 1:
            with_factor.append(present)
        temperatures = [entry[1] for entry in schedule]
        self.first_temperature = min(with_factor or (moderate / 100, present, *temperatures))

        def is_calibrated(target):
            return bool(schedule) and schedule[0][0] <= target <= schedule[-1][0]

        def point(target):
            if is_calibrated(target):
                return sum(map(math.log, config.threshold_for(target)))
            return math.log(present * config.pruning_threshold_factor)

        if self.log_temperatures is None:
            self.log_temperatures = [point(target) for target in self.targets]
        if self.gains is None:
            self.gains = [self.gain or (0.3 if is_calibrated(target) else 1.5) for target in self.targets]

    def _set(self, model, index: int) -> tuple[float, float]:
        threshold = threshold_at(self.log_temperatures[index], self.first_temperature)
        model.set_pruning(temperature=threshold[0], factor=threshold[1])
        return threshold

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if model.config.pruning_granularity == "frozen":
            raise ValueError(
                "ReductionCallback moves the temperature, and this model's token counts are frozen: expected"
                ' model.config.pruning_granularity = "instance" (or "batch") while it trains; calibrate with'
                " freeze=True afterwards."
            )
        # A resumed training's state holds the callback's, whether or not `Trainer` restores callbacks by itself.
        saved = state.stateful_callbacks.get(type(self).__name__)
        begins = self.log_temperatures is None or state.global_step > 0  # also for a callback that has trained before
        if begins and isinstance(saved, dict) and type(self)(**saved["args"]).targets == self.targets:
            for name, value in saved["attributes"].items():
                setattr(self, name, value)
        if self.first_temperature is None or self.gains is None:  # also in the state of a version without
            self._begin(model.config)
        if self._hook is not None:  # of a run that was interrupted
            self._hook.remove()
        self._hook = model.register_forward_hook(self._measure, with_kwargs=True)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._measured.clear()
        self.temperature, self.factor = self._set(model, self._current(state.global_step))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        reduction = torch.stack(self._measured).mean()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(reduction)
            reduction = reduction / torch.distributed.get_world_size()
        # `global_step` has been advanced since the step began.
        current = self._current(state.global_step - 1)
        self.reduction = reduction.item()
        error, before = self.targets[current] - self.reduction, self.errors[current]
        if min(abs(error), abs(before)) > NOISE:
            adapted = self.gains[current] * (1.3 if error * before > 0 else 0.5)
            self.gains[current] = min(max(adapted, GAINS[0]), GAINS[1])
        self.errors[current] = error
        moved = self.log_temperatures[current] + min(max(self.gains[current] * error, -0.5), 0.5)
        # A target out of reach must not wind the temperature up or the factor down without end.
        lowest = math.log(self.first_temperature * FACTORS[0])
        self.log_temperatures[current] = min(max(moved, lowest), math.log(SCAN[-1]))
        self._set(model, -1)

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if logs is not None and "loss" in logs:
            measured = {"reduction": self.reduction, "pruning_temperature": self.temperature}
            if self.factor < 1:
                measured["pruning_threshold_factor"] = self.factor
            logs.update(measured)
            state.log_history[-1].update(measured)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._hook.remove()
        self._set(model, -1)
