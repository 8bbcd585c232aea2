"""What the example scripts are told about pruning, and what follows from it."""

from dataclasses import dataclass, field

from ..model_card import public_name
from ..modeling.configuration_madtp_blip import MadtpBlipConfig
from .reduction_callback import ReductionCallback


@dataclass
class PruningArguments:
    """For `HfArgumentParser`, beside `TrainingArguments`."""

    dense: bool = field(default=False, metadata={"help": "Train and evaluate without pruning."})
    target_reduction: list[float] = field(
        default_factory=lambda: [0.5, 0.8],
        metadata={"help": "The reduction of FLOPs to train at, or two: a range to draw from."},
    )
    num_targets: int = field(default=3, metadata={"help": "How many targets in that range."})
    reductions: list[float] = field(
        default_factory=lambda: [0.3, 0.5, 0.8], metadata={"help": "Reductions to calibrate and evaluate."}
    )
    num_alignment_tokens: int = field(default=256, metadata={"help": "How many alignment tokens."})
    alignment_dim: int = field(default=24, metadata={"help": "Their width; 0 for the text's."})

    def __post_init__(self):
        if self.dense:
            self.reductions = []

    def load_model(self, model_class, source: str):
        """A model that was pruned before, as it is; a dense one with new alignment tokens. `source`: a folder or Hub id."""
        if MadtpBlipConfig.get_config_dict(source)[0].get("pruning_schedule"):
            model = model_class.from_pretrained(source)
        else:
            model = model_class.from_blip(
                source, num_alignment_tokens=self.num_alignment_tokens, alignment_dim=self.alignment_dim or None
            )
        return model.float()  # whatever it was stored in: weights in half precision don't train

    def budgets(self, model) -> list[float]:
        """The reductions to evaluate: 0, and those to calibrate that the model was found to reach."""
        reached = {entry[0] for entry in model.config.pruning_schedule or ()}
        return [0.0, *(reduction for reduction in self.reductions if reduction in reached)]

    def callbacks(self) -> list:
        """What steers the temperature while a model trains."""
        if self.dense:
            return []
        target = self.target_reduction[0] if len(self.target_reduction) == 1 else tuple(self.target_reduction)
        return [ReductionCallback(target, num_targets=self.num_targets)]

    def settings(self, args, trainer) -> dict:
        """What a script trained with, for its results and the model card; `args` has `model` and `train_samples`."""
        training = trainer.args
        steps = trainer.state.global_step
        settings = {"from": public_name(args.model), "steps": steps}
        if steps:
            settings.update(
                {
                    "training rows": args.train_samples or "all",
                    "batch size": training.train_batch_size
                    * training.gradient_accumulation_steps
                    * training.world_size,
                    "learning rate": training.learning_rate,
                    "learning rate schedule": str(
                        getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
                    ),
                    "seed": training.seed,
                }
            )
            if not self.dense:
                settings["target reduction"] = self.target_reduction
                settings["number of targets"] = self.num_targets
        return settings
