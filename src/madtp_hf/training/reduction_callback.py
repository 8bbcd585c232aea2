"""Control how much a model prunes during training, so that it holds a target reduction of FLOPs."""

import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..budgets.passes import measure
from ..modeling.configuration_pruning import is_number


NOISE = 0.02  # how much the reduction varies between batches: the gain does not adapt to smaller errors
GAINS = (0.02, 12.0)  # the smallest and the largest gain


class ReductionCallback(TrainerCallback, ExportableState):
    """A `Trainer` callback that holds a model at a target reduction of FLOPs while it learns.

    After every step the setting moves along the pruning method's path, from no pruning to most, in proportion to the
    difference between the target and the step's measured reduction. This is an integral controller: it settles where
    the mean reduction equals the target, whatever the model, data or learning rate, and follows as the model changes.
    For MADTP, the path is that of `calibrate`: the logarithm of the temperature and, below a low one, of the
    threshold's factor. The reduction's sensitivity to a move differs a hundredfold along this path, so each target's
    gain adapts: it grows while the reduction stays on one side of the target, and is halved when a move overshoots.
    `calibrate` afterwards finds the exact settings.

    Between steps, when `Trainer` evaluates and saves, the model uses the setting of the largest target, so that
    evaluations are comparable and a checkpoint's configuration holds it. Resumed training continues with the
    settings of its checkpoint. The model may be a peft model.

    A model that only learns pruned forgets how to run dense. Therefore each step has a dense pass as well, and the
    pruned passes also learn from its outputs (`config.distillation_weight`): one checkpoint then keeps every budget,
    `set_pruning(None)` included. It costs a dense pass a step; `dense_pass=False` saves that.

    Args:
        target_reduction (`float` or `tuple[float, float]`):
            The share of FLOPs to save, in (0, 1). With a pair, each step draws one of `num_targets` evenly spaced
            targets between the two, each with its own setting, so that one checkpoint learns all of them.
        num_targets (`int`, *optional*, defaults to 5):
            The number of targets, with a pair.
        gain (`float`, *optional*):
            The initial move along the path for an error of 1 in the reduction. Defaults to 0.3 where a calibrated
            schedule gives the starting point, else to 1.5.
        seed (`int`, *optional*, defaults to 0):
            Seed for drawing targets.
        dense_pass (`bool`, *optional*, defaults to `True`):
            Whether each step also trains the dense model, from whose outputs the pruned passes learn.
        largest_pass (`bool`, *optional*, defaults to `False`):
            Whether each step also has a pass at the largest target, as in the sandwich rule of slimmable networks.
        teacher (`PreTrainedModel`, *optional*):
            A frozen dense model whose outputs all passes learn from, such as the dense checkpoint.

    Raises:
        ValueError: if a target is out of bounds.
        TypeError: if the target is not a number or a pair of numbers.
    """

    def __init__(
        self,
        target_reduction: float | tuple[float, float],
        num_targets: int = 5,
        gain: float | None = None,
        seed: int = 0,
        dense_pass: bool = True,
        largest_pass: bool = False,
        teacher: PreTrainedModel | None = None,
    ):
        given = target_reduction if isinstance(target_reduction, (tuple, list)) else (target_reduction,)
        if len(given) not in (1, 2) or not all(is_number(target) for target in given):
            raise TypeError(
                f"target_reduction={target_reduction!r}: expected a number in (0, 1), such as 0.5, or a pair of them."
            )
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
        self.dense_pass, self.largest_pass = dense_pass, largest_pass
        self.teacher = teacher if teacher is None else teacher.eval().requires_grad_(False)
        self.targets = torch.linspace(low, high, num_targets if low < high else 1).tolist()
        self.start: float | None = None  # of the path, see `PruningMethod.path`
        self.points: list[float] = []  # one per target, on the path; none until training begins
        self.gains: list[float] = []  # one per target
        self.errors = [0.0] * len(self.targets)
        self._measured: dict[int, list[torch.Tensor]] = {}  # for each target of the step, the reductions of its passes

    def state(self) -> dict:
        """Return what a checkpoint keeps so that training can resume (see `ExportableState`)."""
        return {
            "args": {
                "target_reduction": self.target_reduction,
                "num_targets": self.num_targets,
                "gain": self.gain,
                "seed": self.seed,
                "dense_pass": self.dense_pass,
                "largest_pass": self.largest_pass,
            },
            "attributes": {
                "start": self.start,
                "points": self.points,
                "gains": self.gains,
                "errors": self.errors,
            },
        }

    def _current(self, step: int) -> int:
        """Return the index of a step's target, drawn from its number: the same on all processes and on resuming."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return int(torch.randint(len(self.targets), (), generator=generator))

    def _targets(self, step: int) -> list[int]:
        """Return the indices of the targets that a step's passes have; the drawn one comes last."""
        drawn = self._current(step)
        largest = len(self.targets) - 1
        return [largest, drawn] if self.largest_pass and drawn != largest else [drawn]

    def _begin(self, model) -> None:
        """Choose the path and the starting point of each target on it.

        The starting point comes from the calibrated schedule if there is one, else from the model's present setting,
        else it is a moderate one.
        """
        config, method = model.config, model.pruning_method
        entries = [*(config.pruning_schedule or ()), *([config.pruning_setting] if config.pruning_setting else ())]
        settings = [method.read_setting({k: v for k, v in entry.items() if k != "reduction"}) for entry in entries]
        self._path = method.path(config, settings, self.start)
        self.start = self._path.start
        present = self._path.point(settings[-1]) if config.pruning_setting else self._path.moderate
        calibrated = config.calibrated_reductions or [2.0]
        are_calibrated = [calibrated[0] <= target <= calibrated[-1] for target in self.targets]
        if not self.points:
            self.points = [
                self._path.point(model.setting_for(target)) if is_calibrated else present
                for target, is_calibrated in zip(self.targets, are_calibrated)
            ]
        if not self.gains:
            self.gains = [self.gain or (0.3 if is_calibrated else 1.5) for is_calibrated in are_calibrated]

    def _set(self, model, index: int) -> dict[str, float]:
        setting = self._path.setting(self.points[index])
        model.set_pruning(**setting)
        return setting

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if model.config.pruning_granularity == "frozen":
            raise ValueError(
                "ReductionCallback moves the pruning setting, and this model's token counts are frozen: expected"
                ' model.config.pruning_granularity = "instance" (or "batch") while it trains; calibrate with'
                " freeze=True afterwards."
            )
        # A resumed training's state contains the callback's, whether or not `Trainer` restores callbacks itself.
        saved = state.stateful_callbacks.get(type(self).__name__)
        begins = not self.points or state.global_step > 0  # or the callback has trained before
        if begins and isinstance(saved, dict) and type(self)(**saved["args"]).targets == self.targets:
            for name, value in saved["attributes"].items():
                setattr(self, name, value)
        self._begin(model)
        if self.teacher is not None:
            self.teacher.to(model.device)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        targets = self._targets(state.global_step)
        self._measured = {index: [] for index in targets}
        settings = [self._path.setting(self.points[index]) for index in targets]
        self.setting = self._set(model, targets[-1])
        dense = [None] * self.dense_pass

        def observe(index, batch, output):
            self._measured[targets[index - len(dense)]].append(measure(model, batch, output).mean())

        model.set_training_passes([*dense, *settings], observe, self.teacher)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        # `Trainer` has incremented `global_step` since the step began.
        for index in self._targets(state.global_step - 1):
            reduction = torch.stack(self._measured[index]).mean()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(reduction)
                reduction = reduction / torch.distributed.get_world_size()
            self.reduction = reduction.item()
            self._move(index)
        model.set_training_passes(None)
        self._set(model, -1)

    def _move(self, index: int) -> None:
        """Move a target's point on the path, after a step that has reached `self.reduction`."""
        error, before = self.targets[index] - self.reduction, self.errors[index]
        if min(abs(error), abs(before)) > NOISE:
            adapted = self.gains[index] * (1.3 if error * before > 0 else 0.5)
            self.gains[index] = min(max(adapted, GAINS[0]), GAINS[1])
        self.errors[index] = error
        moved = self.points[index] + min(max(self.gains[index] * error, -0.5), 0.5)
        # Clamp: an unreachable target must not move the setting without end.
        self.points[index] = min(max(moved, self._path.points[0]), self._path.points[-1])

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if logs is not None and "loss" in logs:
            measured = {"reduction": self.reduction}
            measured.update({f"pruning_{name}": value for name, value in self.setting.items()})
            logs.update(measured)
            state.log_history[-1].update(measured)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        model.set_training_passes(None)
        self._set(model, -1)
