"""What all pruned models share: the switch for pruning, the method, and conversion from a dense model."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from .attention import CLASS_TOKEN_FIRST
from .encoder import BranchOutput, Tower
from .method_class_attention import ClassAttentionMethod  # noqa: F401 (importing a method registers it)
from .method_code import carry_code, is_own
from .method_evit import EvitMethod  # noqa: F401
from .method_madtp import AlignmentProjection, MadtpAlignment, init_alignment
from .method_madtp_merge import MadtpMergeMethod  # noqa: F401
from .method_random import RandomMethod  # noqa: F401
from .method_tome import TomeMethod  # noqa: F401
from .prepared_linear import PRECISIONS, can_prepack, check_kernels, prepare_linear_maps, restore_linear_maps
from .pruning_method import PruningMethod, get_method
from .sequences import Sequences
from .token_pruning import alignment_loss
from .training_passes import TrainingPasses


if TYPE_CHECKING:
    from typing_extensions import Self

    _Host = PreTrainedModel  # what the mixin is mixed into
else:
    _Host = object

logger = logging.get_logger("transformers.models.madtp")


@dataclass
class PruningOutput:
    r"""
    Fields that the outputs of all models add to those of transformers.

    task_loss (`torch.Tensor`, *optional*):
        The task's loss; with pruning on, `loss` is `task_loss + alignment_loss_weight * alignment_loss`.
    alignment_loss (`torch.Tensor`, *optional*):
        The mean over samples and alignment tokens of 1 - cos between image and text features; 0 with pruning off, and
        if no text is encoded.
    vision_tokens, text_tokens (`torch.LongTensor` of shape `(num_layers + 1, batch_size)`):
        The number of tokens that enter the encoder, then that each of its layers leaves, with the class token and
        without padding. For two images per sample, vision_tokens is `(num_layers + 1, 2, batch_size)`.
    image_mask (`torch.BoolTensor` of shape `(batch_size, image_length)`, *optional*):
        True at the real tokens of `image_embeds`, and everywhere if nothing is padded.
    vision_positions (`tuple(torch.LongTensor)`, *optional*, returned with `output_positions=True`):
        For the tokens that enter the vision encoder, then those that each layer leaves, a tensor `(batch_size,
        length)`: each token's position in the input, 0 for the class token, n for the n-th patch, and -1 for merged
        tokens and padding.
    """

    task_loss: torch.Tensor | None = None
    alignment_loss: torch.Tensor | None = None
    vision_tokens: torch.Tensor | None = None
    text_tokens: torch.Tensor | None = None
    image_mask: torch.Tensor | None = None
    vision_positions: tuple[torch.Tensor, ...] | None = None


# What transformers' processors and callers also pass to BLIP and CLIP, where it changes nothing.
IGNORED_ARGUMENTS = {"token_type_ids", "use_cache"}

# sentence-transformers reads these files of a checkpoint; with them, its `encode` takes a `reduction`.
_TRANSFORMER = "sentence_transformers.models.Transformer"
_SENTENCE_TRANSFORMERS_FILES = {
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": _TRANSFORMER, "kwargs": ["reduction"]}],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {
            modality: {"method": f"get_{modality}_features", "method_output_name": "pooler_output"}
            for modality in ("text", "image")
        },
        "module_output_name": "sentence_embedding",
    },
}
NOT_GIVEN: Any = object()  # `reduction=None` is off, as `None` is; no argument at all is an error
# By model (its id), the method and the setting of `with model.pruning(...)`. Each thread sees its own.
_OVERRIDES: ContextVar[dict[int, tuple] | None] = ContextVar("pruning of one thread", default=None)


@torch.compiler.disable(reason="a pruned encoder's shapes depend on values; to compile it, freeze its token counts")
def _run_eagerly(tower: Tower, *args, **options) -> BranchOutput:
    """Run an encoder outside of compiled code, which would be compiled again for other lengths of the sequences.

    The output is padded, because lists of lengths are constants of compiled code, and has a mask, even if all samples
    happen to keep as many tokens.
    """
    output = tower(*args, as_branch=True, **options)
    layout = output.sequences
    mask = layout.mask
    if mask is None:
        mask = torch.ones(layout.batch_size, layout.max_seqlen, dtype=torch.bool, device=layout.device)
    padded = Sequences.padded(layout.batch_size, layout.max_seqlen, layout.device, mask, layout.lengths)
    # A copy, since compiled code would depend on the shape of what a view is of.
    return output._replace(states=output.hidden_states.flatten(0, 1).clone(), sequences=padded)


class PruningPass:
    """Pruning in one forward pass: what is read from the configuration, once.

    method: the pruning method. setting: its setting, None with pruning off. granularity: see the configuration.
    token_counts: how many tokens each layer of each branch leaves, if that is frozen.
    """

    def __init__(self, config, method: type[PruningMethod], setting: dict | None):
        if setting is not None and not all(name in method.fields for name in setting):
            raise ValueError(
                f"The setting {setting} does not fit the pruning method {method.name!r}, which expects"
                f" {', '.join(method.fields)}."
            )
        self.method, self.setting, self.granularity = method, setting, config.pruning_granularity
        self.modalities = [name for name in config.pruning_modalities if name in method.modalities]
        counts_are_fixed = setting is None or method.has_fixed_counts
        self.token_counts = None if counts_are_fixed else config.token_counts(setting)

    @property
    def is_on(self) -> bool:
        return self.setting is not None

    def depends_on_values(self, modality: str) -> bool:
        """Return whether the shapes of a branch, `"vision"` or `"text"`, depend on values and not on shapes alone."""
        if not self.is_on or self.granularity == "frozen":
            return False
        return modality == "text" or not self.method.has_fixed_counts

    def prunes(self, modality: str) -> bool:
        """Return whether a branch, `"vision"` or `"text"`, loses tokens."""
        return self.is_on and modality in self.modalities

    def encode(self, modality: str, tower: Tower, *args, **options) -> BranchOutput:
        """Run a branch's encoder; within compiled code, eagerly if its shapes depend on values."""
        if torch.compiler.is_compiling() and self.depends_on_values(modality):
            return _run_eagerly(tower, *args, **options)
        return tower(*args, as_branch=True, **options)

    @property
    def text_layout(self) -> str:
        """How texts are laid out, one of `sequences.TEXT_LAYOUTS`: with pruning off, as in transformers."""
        if not self.is_on:
            return "dense"
        return "padded" if self.granularity == "frozen" else "varlen"


class PrunedModelMixin(_Host):
    """Adds pruning to a `PreTrainedModel` whose configuration is a `PruningConfigMixin`.

    A family says `branch_specs`, `min_kept`, whether every layer has an alignment projection of its own, and the
    classes it is made from; its `forward` begins with `start_pass` and gets each branch's method from
    `make_method`. The alignment tokens are in `alignment`.
    """

    config_class: type[PretrainedConfig]
    task: str  # as `madtp_hf.count_flops` names it
    _dense_classes: tuple[type[PreTrainedModel], ...] = ()  # transformers' classes that this one converts from
    _from_dense_name = "from_dense"  # the family's public name for it
    _new_in_task = ("alignment.",)  # parts of names of parameters that the dense classes lack
    inference_precision: str | None = None  # what `prepare_for_inference` has prepared
    _fused_activations: dict[type, tuple[str, str]] = {}  # module class -> names of its map and activation
    # What each branch protects; the fewest removable tokens that a layer keeps; one alignment projection per layer?
    branch_specs = {"vision": CLASS_TOKEN_FIRST, "text": CLASS_TOKEN_FIRST}
    min_kept = 1
    has_layer_projections = False
    distilled: dict[str, str] = {}  # the outputs that pruned passes learn, see `training_passes.distillation_loss`
    _training_passes: TrainingPasses | None = None
    # `save_pretrained` saves the modeling code for `AutoModel`. A task adds its own auto class and pipeline, if it has
    # them.
    _auto_class = "AutoModel"
    _task_auto_class: str | None = None
    _task_pipeline: tuple[str, str] | None = None
    # False, because the loss is a mean over this batch: `Trainer` must divide it by its accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config):
        super().__init__(config)
        for branch in (config.vision_config, config.text_config):
            if branch._attn_implementation is None:  # inherits the whole model's
                branch._attn_implementation = config._attn_implementation
        self.model_tags = list(self.model_tags or ())  # `add_model_tags` and `push_to_hub(tags=...)` add to it
        family, name = config.model_type, type(self).__name__
        config.auto_map = {
            "AutoConfig": f"configuration_{family}.{self.config_class.__name__}",
            "AutoModel": f"modeling_{family}.{name}",
        }
        if self._task_auto_class is not None:
            config.auto_map[self._task_auto_class] = f"modeling_{family}.{name}"
        if self._task_pipeline is not None:
            task, pipeline = self._task_pipeline
            config.custom_pipelines = {
                task: {
                    "impl": pipeline,
                    "pt": [self._task_auto_class or "AutoModel"],
                    "type": "multimodal",
                    "default": {},
                }
            }
        get_method(config.pruning_method)  # an unknown one is an error now, not in the first pass
        self.alignment = MadtpAlignment(config, per_layer=self.has_layer_projections)

    def post_init(self):
        super().post_init()
        for tower in self.children():
            if isinstance(tower, Tower):
                tower.belong_to(self)

    def _initialize_weights(self, module, *custom_code):
        # In custom code, transformers leaves out modules without parameters of their own, such as CLIP's attention,
        # which initialise their children. Ours goes by the flags of loaded weights, as transformers' own models do.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        init_alignment(module, getattr(self.config, "initializer_range", 0.02))

    if TYPE_CHECKING:

        def to(self, *args, **kwargs) -> "Self": ...  # transformers' decorator hides that this is a method

    # Pruning

    def set_pruning(self, *args: None, reduction: float | None = NOT_GIVEN, **setting: float | None) -> None:
        """Set how much the model prunes, from the next forward pass on. The setting is stored in the configuration.

        `set_pruning(None)` turns pruning off.

        Args:
            reduction (`float`, *optional*):
                The share of FLOPs to save, in [0, 1), by the schedule that `madtp_hf.calibrate` has measured.
            setting (`float`):
                The method's setting by name. `temperature`, the threshold's, for MADTP, merging or not, and class
                attention: 0 is off, larger values prune more; with it, `factor` in (0, 1] multiplies the threshold,
                and smaller values prune less. `keep_rate` for EViT and random tokens, `r` for ToMe. `None` is off.

        Raises:
            TypeError: if a number is passed without its name.
            ValueError: if a value can't be set; the model is then unchanged.
        """
        method = self.pruning_method
        setting = self._read_setting(method, args, reduction, setting)
        PruningPass(self.config, method, setting)  # raises if it is frozen without counts for this setting
        self.config.pruning_setting = setting

    @contextmanager
    def pruning(
        self,
        *args: None,
        method: str | type[PruningMethod] | None = None,
        reduction: float | None = NOT_GIVEN,
        **setting: float | None,
    ) -> "Iterator[Self]":
        """Prune as in `set_pruning`, within a `with` block and in this thread alone.

            with model.pruning(reduction=0.5):
                model(**inputs)

        Nothing is stored, other threads prune as before, and inner blocks win.

        Args:
            method (`str` or a subclass of `PruningMethod`, *optional*):
                Another pruning method than the model's.
        """
        method = self._find_method(method)
        setting = self._read_setting(method, args, reduction, setting)
        PruningPass(self.config, method, setting)
        token = _OVERRIDES.set({**(_OVERRIDES.get() or {}), id(self): (method, setting)})
        try:
            yield self
        finally:
            _OVERRIDES.reset(token)

    def _find_method(self, method) -> type[PruningMethod]:
        if method is None:
            return self.pruning_method
        return method if isinstance(method, type) and issubclass(method, PruningMethod) else get_method(method)

    def _read_setting(self, method: type[PruningMethod], args: tuple, reduction, setting: dict) -> dict | None:
        if not args and reduction is NOT_GIVEN and not setting:
            fields = " or ".join(f"{name}=..." for name in ("reduction", *method.fields))
            raise TypeError(f"set_pruning got no setting: expected {fields}; set_pruning(None) is off.")
        if args and args != (None,):
            raise TypeError(
                f"set_pruning got {', '.join(map(repr, args))} without a name: expected"
                f" set_pruning(reduction={args[0]!r}), a share of the"
                f" FLOPs to save, or set_pruning({next(iter(method.fields))}={args[0]!r}), the method's own setting;"
                " set_pruning(None) is off."
            )
        if reduction is None or reduction is NOT_GIVEN:
            return method.read_setting(setting)
        given = {name: value for name, value in setting.items() if value is not None}
        if given:
            named = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise ValueError(f"Both {named} and {reduction=} were given: expected one of them.")
        reached = self.setting_for(reduction)
        return None if reached is None else method.read_setting(reached)

    def setting_for(self, reduction: float) -> dict[str, float] | None:
        """Return the method's setting that saves a share of FLOPs by the calibrated schedule, None for 0, off.

        Between entries of the schedule, the setting is interpolated.

        Raises:
            ValueError: if the reduction is outside [0, 1) or the schedule's range, or there is no schedule.
        """
        if reduction == 0 and not isinstance(reduction, bool):
            return None
        low, high, share = self.config.schedule_entries(reduction)
        return self.pruning_method.between(low, high, share)

    def set_training_passes(self, settings: list[dict | None] | None, observe=None, teacher=None) -> None:
        """Set the forward passes of the next training steps, see `TrainingPasses`; None trains as the model is set.

        `madtp_hf.ReductionCallback` calls this before each step.
        """
        self._training_passes = None if settings is None else TrainingPasses(settings, observe, teacher)

    @property
    def pruning_method(self) -> type[PruningMethod]:
        """The class of the model's pruning method."""
        return get_method(self.config.pruning_method)

    def set_pruning_method(self, method: str | type[PruningMethod]) -> None:
        """Choose tokens by another method, from the next forward pass on. It is stored in the configuration.

        Pruning is off afterwards. A calibrated schedule belongs to the former method and is dropped, with a warning.

        Args:
            method (`str` or a subclass of `PruningMethod`):
                `"madtp"`, `"madtp_merge"`, `"class_attention"`, `"evit"`, `"tome"`, `"random"`, or a class of your own
                with a `name`, whose file checkpoints carry.

        Raises:
            TypeError: if `method` is a class without a name, or neither a name nor such a class.
            ValueError: if there is no method of that name.
        """
        if isinstance(method, type) and issubclass(method, PruningMethod) and vars(method).get("name"):
            method = method.name
        if not isinstance(method, str):
            raise TypeError(
                f"set_pruning_method got {method!r}: expected the name of a pruning method, or a subclass of"
                " PruningMethod with a `name` of its own."
            )
        get_method(method)
        if method != self.config.pruning_method:
            self.config.drop_schedule(f"it was calibrated with pruning_method={self.config.pruning_method!r}")
            self.config.pruning_method = method

    def start_pass(self, reduction: float | None = None) -> PruningPass:
        """Return the pruning of a forward pass that begins: its own, else this thread's, else the configuration's."""
        method, setting = self.pruning_method, self.config.pruning_setting
        if not torch.compiler.is_compiling():  # compiled code can't read a thread's own value
            method, setting = (_OVERRIDES.get() or {}).get(id(self), (method, setting))
        if reduction is not None:
            setting = self._read_setting(method, (), reduction, {})
        found = PruningPass(self.config, method, setting)
        is_exporting = getattr(torch.compiler, "is_exporting", bool)() or torch.jit.is_tracing()
        if is_exporting and any(map(found.depends_on_values, self.branch_specs)):
            raise RuntimeError(
                "A pruned pass has shapes that depend on values, which torch.export and torch.jit.trace can't record:"
                " fix the token counts by madtp_hf.calibrate(model, dataloader, reductions, freeze=True) and set one"
                " of these reductions, or turn pruning off."
            )
        return found

    @property
    def is_pruning(self) -> bool:
        """Whether pruning is on. If it is off, the model computes what transformers' model does."""
        return self.start_pass().is_on

    def make_method(self, pruning: PruningPass, modality: str, with_feature: bool = False) -> PruningMethod | None:
        """Create the method of a branch for one forward pass, None for a dense branch.

        Args:
            pruning (`PruningPass`):
                What `start_pass` returned.
            modality (`str`):
                The branch, `"vision"` or `"text"`.
            with_feature (`bool`, *optional*, defaults to `False`):
                Whether the loss needs the branch's alignment feature.
        """
        return pruning.method.for_branch(self, pruning, modality, with_feature)

    def compute_alignment_loss(
        self, image_feature: torch.Tensor | None, text_feature: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the alignment loss, 0 if a branch has no feature, as with pruning off.

        The 0 depends on all alignment parameters, because distributed training waits for the gradient of each.
        """
        if image_feature is None or text_feature is None:
            return self.alignment(None)
        return alignment_loss(image_feature, text_feature)

    # Saving

    def save_pretrained(self, save_directory: str | Path, *args, push_to_hub: bool = False, **kwargs) -> None:
        """Save as transformers does, and with it what transformers doesn't know.

        This is the file of a pruning method of one's own and, for models that embed, what sentence-transformers reads.
        """
        carries, embeds = is_own(self.pruning_method), hasattr(self, "get_text_features")
        super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub and not (carries or embeds), **kwargs)
        if (carries or embeds) and kwargs.get("is_main_process", True):
            if carries:
                carry_code(self.pruning_method, Path(save_directory), f"modeling_{self.config.model_type}.py")
            if embeds:
                for name, content in _SENTENCE_TRANSFORMERS_FILES.items():
                    Path(save_directory, name).write_text(json.dumps(content, indent=2) + "\n")
            if push_to_hub:
                names = ("commit_message", "private", "token", "revision", "create_pr", "max_shard_size")
                options = {name: kwargs[name] for name in names if name in kwargs}
                self.push_to_hub(kwargs.get("repo_id") or Path(save_directory).name, **options)

    # Arguments of `forward`

    def _outputs(self, output_hidden_states, output_attentions) -> dict:
        """Return which outputs an encoder computes: `forward`'s arguments, else the configuration's."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions:
            self._warn_of_maps()
        return {"output_hidden_states": output_hidden_states, "output_attentions": bool(output_attentions)}

    def _warn_of_maps(self) -> None:
        used = self.config._attn_implementation
        if used != "eager":
            logger.warning_once(
                f"output_attentions=True with attn_implementation={used!r}: attention is computed eagerly, in this"
                " call alone, since other implementations keep no maps."
            )

    def _check_arguments(self, unknown: dict) -> None:
        unknown = unknown.keys() - IGNORED_ARGUMENTS
        if unknown:
            raise TypeError(
                f"{type(self).__name__} got {', '.join(unknown)}: expected only arguments that its `forward` lists;"
                " see its documentation."
            )
        if self.training and self.dtype in (torch.float16, torch.bfloat16):
            logger.warning_once(
                f"This model trains with weights of {self.dtype}, in which small updates are lost: load it with"
                " dtype=torch.float32 and let"
                " the Trainer's `bf16` or `fp16` compute in half precision."
            )

    # Adapters

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        # peft saves no configuration: the schedule goes with its copy of the alignment tokens.
        schedule = self.config.pruning_schedule
        content = torch.tensor(list(json.dumps(schedule).encode()), dtype=torch.uint8) if schedule else None
        for name, module in self.named_modules():
            if isinstance(module, MadtpAlignment):
                module.schedule = content if "modules_to_save." in name else None
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in [name for name in state_dict if name.startswith(prefix + "alignment.")]:
            if name.endswith(".schedule"):
                self.config.pruning_schedule = json.loads(bytes(state_dict.pop(name).tolist()))
        super()._load_from_state_dict(state_dict, prefix, *args)

    # Inference

    def prepare_for_inference(self, precision: str | None = "auto") -> "Self":
        """Prepare the model for fast inference; outputs are those of the weights as they are whenever it runs.

        On a CPU, linear maps in a transformer's layers multiply by prepared weights: prepacked in float32 or bfloat16,
        or quantized to int8 per channel, with states quantized per token. In bfloat16, attention that needs no maps
        computes in it as well. Everything else (embeddings, norms, the choice of tokens, heads) stays float32, small
        weights stay as they are, and so do parameters and saved checkpoints. Prepared weights take memory of their
        own; that of weights mapped from a checkpoint's file is released. They are used in evaluation mode without
        gradients, and prepared again when a weight has changed.

        On a GPU, `"bfloat16"` casts the model itself, and `"float32"` casts it back.

        Args:
            precision (`str` or `None`, *optional*, defaults to `"auto"`):
                `"float32"`, `"bfloat16"` or `"int8"`. `"auto"` is the model's own dtype on a CPU, and bfloat16 on a
                GPU that has it. `None` undoes the preparation of a CPU.

        Returns:
            The model itself.

        Raises:
            ValueError: for another precision, and for int8 on another device than a CPU.
            RuntimeError: if torch was built without the kernels that the precision needs.
        """
        if precision not in ("auto", None, *PRECISIONS):
            raise ValueError(f"{precision=}: expected one of auto, {', '.join(PRECISIONS)}, or None to undo it.")
        on_cpu = self.device.type == "cpu"
        if precision == "auto":
            precision = self._fast_precision()
        if on_cpu and precision is not None:
            check_kernels(precision)
        elif precision == "int8":
            raise ValueError(
                f"precision='int8' on {self.device}: expected a CPU. For a GPU, quantize the model with"
                " torchao, see `TorchAoConfig` of transformers."
            )
        self.inference_precision = precision
        for module in self.modules():
            if isinstance(module, AlignmentProjection):
                module.keep_folded(on_cpu and precision is not None)
        if not on_cpu or precision is None:
            restore_linear_maps(self)
            return self if precision is None else self.to(getattr(torch, precision))
        prepare_linear_maps(self, precision, self._fused_activations)
        return self

    def _fast_precision(self) -> str | None:
        """Return the fastest precision whose outputs this device's users expect; None if none is faster."""
        if self.device.type == "cpu":
            dtype = str(self.dtype).removeprefix("torch.")
            return dtype if dtype in PRECISIONS and can_prepack() else None
        has_bfloat16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return "bfloat16" if has_bfloat16 else None

    # Loading

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> "Self":
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise ValueError(
                f"{pretrained_model_name_or_path} has tensors of other shapes than a {cls.__name__}: expected a"
                f" checkpoint of this class. A dense model becomes one by {cls._from_dense_name}(source)."
            ) from error

    # From a dense model

    @classmethod
    def from_dense(cls, source: "PreTrainedModel | str | Path", **config_overrides) -> "Self":
        """Convert transformers' model for the same task, or a path or Hub id of one.

        Only the alignment parameters are new. Each family has a name of its own for it, such as `from_blip`.
        """
        config_class, method = cls.config_class, cls._from_dense_name
        classes = (*cls._dense_classes, cls)
        expected = " or a ".join(dense_class.__name__ for dense_class in classes)
        defaults = config_class()
        overrides = {
            name: value for name, value in config_overrides.items() if hasattr(defaults, name) and "dtype" not in name
        }
        loading = {name: value for name, value in config_overrides.items() if name not in overrides}
        attention, device_map = (loading.pop(name, None) for name in ("attn_implementation", "device_map"))
        if not isinstance(source, PreTrainedModel):
            source = cls._load_dense(source, classes, expected, loading, method)
        elif loading:
            raise TypeError(
                f"{cls.__name__}.{method} got {', '.join(loading)}: no such field in {config_class.__name__}; options"
                " of loading go with a path"
                " or Hub id, and this is a model already."
            )
        if not isinstance(source, classes):
            raise TypeError(
                f"{cls.__name__}.{method} got a {type(source).__name__}: expected a {expected}, or a path or Hub id of"
                " one."
            )
        fields = source.config.to_dict()
        fields.pop("model_type", None)
        model = cls(config_class(**{**fields, **overrides})).to(device=source.device, dtype=source.dtype)
        if attention is not None:
            model.set_attn_implementation(attention)
        weights = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("alignment.")}
        if not isinstance(source, cls):
            weights = cls._from_dense_weights(weights)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        missing = [name for name in missing if not any(new in name for new in cls._new_in_task)]
        if missing or unexpected:
            raise ValueError(f"The dense model does not fit its configuration: {missing=}, {unexpected=}.")
        if cls.can_generate() and source.generation_config is not None:
            model.generation_config = copy.deepcopy(source.generation_config)
        return place(model.train(source.training), device_map)

    @classmethod
    def _load_dense(cls, source, classes, expected: str, loading: dict, method: str) -> PreTrainedModel:
        hub_options = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
        found = {name: loading[name] for name in hub_options if name in loading}
        saved = cls.config_class.get_config_dict(source, **found)[0]
        named = saved.get("architectures") or []
        dense_class = next((c for c in classes if c.__name__ in named), None)
        if dense_class is None and not named:
            dense_class = next((c for c in classes if c.config_class.model_type == saved.get("model_type")), None)
        if dense_class is None:
            what = named[0] if named else f"model of type {saved.get('model_type')!r}"
            raise ValueError(f"{cls.__name__}.{method} got {source}, a {what}: expected a {expected}.")
        try:
            dense, info = dense_class.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, **loading
            )
        except TypeError as error:
            if not any(name in str(error) for name in loading):
                raise
            raise TypeError(
                f"{cls.__name__}.{method} got {', '.join(loading)}: expected fields of the configuration or what"
                " `from_pretrained` takes."
            ) from error
        amiss = [
            key if isinstance(key, str) else key[0]  # a key of another shape comes with the shapes
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            for key in info[kind]
        ]
        if amiss:
            raise ValueError(
                f"{source} is not a checkpoint of a {expected}: {len(amiss)} of its tensors are missing, not"
                f" expected or of another shape ({', '.join(sorted(amiss)[:3])}, ...). Expected one of that class."
            )
        return dense

    @classmethod
    def _from_dense_weights(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return state_dict


def place(model: PreTrainedModel, device_map) -> PreTrainedModel:
    """Move a model according to a `device_map` as in `from_pretrained`; None leaves it where it is."""
    if device_map is None:
        return model
    automatic = ("auto", "balanced", "balanced_low_0", "sequential")
    if not isinstance(device_map, dict) and device_map not in automatic:
        return model.to(device_map)
    try:
        from accelerate import dispatch_model, infer_auto_device_map
    except ImportError as error:
        raise ImportError(f"device_map={device_map!r} needs accelerate: pip install accelerate.") from error
    if isinstance(device_map, str):
        device_map = infer_auto_device_map(model, no_split_module_classes=model._no_split_modules)
    return dispatch_model(model, device_map)
