"""Control the pruning threshold during training so that a model holds a target reduction of FLOPs."""

import math

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..budgets.calibration import FACTORS, SCAN, threshold_at
from ..budgets.passes import measure


NOISE = 0.02  # how much the reduction varies between batches: the gain does not adapt to smaller errors
GAINS = (0.02, 12.0)  # the smallest and the largest gain


class ReductionCallback(TrainerCallback, ExportableState):
    """A `Trainer` callback that holds a model at a target reduction of FLOPs while it learns.

    After every step the temperature moves, on a logarithmic scale, in proportion to the difference between the target
    and the step's measured reduction. This is an integral controller: it settles where the mean reduction equals the
    target, whatever the model, data or learning rate, and follows as the model changes. Below a low temperature, the
    threshold's factor moves instead, on the path that `calibrate` searches. The reduction's sensitivity to a move
    differs a hundredfold along this path, so each target's gain adapts: it grows while the reduction stays on one side
    of the target, and is halved when a move overshoots. `calibrate` afterwards finds the exact thresholds.

    Between steps, when `Trainer` evaluates and saves, the model uses the threshold of the largest target, so that
    evaluations are comparable and a checkpoint's configuration holds that threshold. Resumed training continues with
    the thresholds of its checkpoint. The model may be a peft model.

    Args:
        target_reduction (`float` or `tuple[float, float]`):
            The share of FLOPs to save, in (0, 1). With a pair, each step draws one of `num_targets` evenly spaced
            targets between the two, each with its own threshold, so that one checkpoint learns all of them.
        num_targets (`int`, *optional*, defaults to 5):
            The number of targets, with a pair.
        gain (`float`, *optional*):
            The initial change of the logarithm of the temperature, or of the factor, for an error of 1 in the
            reduction. Defaults to 0.3 where a calibrated schedule gives the starting point, else to 1.5.
        seed (`int`, *optional*, defaults to 0):
            Seed for drawing targets.
    """

    def __init__(self, target_reduction, num_targets: int = 5, gain: float | None = None, seed: int = 0):
        low, high = target_reduction if isinstance(target_reduction, (tuple, list)) else (target_reduction,) * 2
        if not 0 < low <= high < 1:
            raise ValueError(
                f"target_reduction={target_reduction!r}: expected a number in (0, 1), or a pair of these, the smaller"
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
        self.log_temperatures = None  # points on the path: log of the temperature, times the factor if below 1
        self.gains = None  # one per target
        self.errors = [0.0] * len(self.targets)
        self._measured = []
        self._hook = None

    def state(self) -> dict:
        """Return what a checkpoint keeps so that training can resume (see `ExportableState`)."""
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
        """Return the index of a step's target, drawn from its number: the same on all processes and on resuming."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return int(torch.randint(len(self.targets), (), generator=generator))

    def _measure(self, model, args, kwargs, output) -> None:
        if model.training:
            self._measured.append(measure(model, kwargs, output).mean())

    def _begin(self, config) -> None:
        """Choose the path and the starting point of each target on it.

        The starting point comes from the calibrated schedule if there is one, else from the model's present threshold,
        else from a moderate temperature.
        """
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
        # A resumed training's state contains the callback's, whether or not `Trainer` restores callbacks itself.
        saved = state.stateful_callbacks.get(type(self).__name__)
        begins = self.log_temperatures is None or state.global_step > 0  # or the callback has trained before
        if begins and isinstance(saved, dict) and type(self)(**saved["args"]).targets == self.targets:
            for name, value in saved["attributes"].items():
                setattr(self, name, value)
        if self.first_temperature is None or self.gains is None:  # also for an older version's state
            self._begin(model.config)
        if self._hook is not None:  # left by an interrupted run
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
        # `Trainer` has incremented `global_step` since the step began.
        current = self._current(state.global_step - 1)
        self.reduction = reduction.item()
        error, before = self.targets[current] - self.reduction, self.errors[current]
        if min(abs(error), abs(before)) > NOISE:
            adapted = self.gains[current] * (1.3 if error * before > 0 else 0.5)
            self.gains[current] = min(max(adapted, GAINS[0]), GAINS[1])
        self.errors[current] = error
        moved = self.log_temperatures[current] + min(max(self.gains[current] * error, -0.5), 0.5)
        # Clamp: an unreachable target must not move the temperature up or the factor down without end.
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
