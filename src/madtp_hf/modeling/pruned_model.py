"""What all pruned models share: alignment tokens, the switch for pruning, and conversion from a dense model."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

from .attention import TokenRoles
from .encoder import AlignmentTokens, MadtpReduction, TokenReduction
from .prepared_linear import (
    PRECISIONS,
    Source,
    can_prepack,
    check_kernels,
    prepare_linear_maps,
    restore_linear_maps,
)
from .token_pruning import alignment_loss


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


class AlignmentProjection(nn.Module):
    """The linear map from a branch's width D to the alignment tokens' E, folded into them for inference.

    It is no `nn.Linear`, so that adapters and quantization, which look for those, leave the choice of tokens alone.

    keeps_folded: whether the folded weight is kept until a parameter changes, as a prepared weight is.
    """

    keeps_folded = False
    _folded = None

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight, self.bias = nn.Linear(in_features, out_features).parameters()

    def forward(self, states: torch.Tensor | None = None, alignment_tokens: torch.Tensor | None = None):
        """Project states (..., D) -> (..., E), or fold the projection into alignment tokens (T, E).

        Folding returns the weight (T, D) and bias (T,) of the map that gives the alignment scores directly:
        (x W^T + b) S^T = x (S W)^T + b S^T.
        """
        if alignment_tokens is None:
            return F.linear(states, self.weight, self.bias)
        parts = alignment_tokens, self.weight, self.bias
        keeps = self.keeps_folded and not self.training and self.weight.device.type == "cpu"
        if not keeps or torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._folded = None if not keeps else self._folded
            return alignment_tokens @ self.weight, alignment_tokens @ self.bias
        if self._folded is None or not self._folded[0].is_current(*parts):
            self._folded = Source(*parts), (alignment_tokens @ self.weight, alignment_tokens @ self.bias)
        return self._folded[1]

    def keep_folded(self, keeps: bool) -> None:
        self.keeps_folded, self._folded = keeps, None

    def __getstate__(self):
        return {**self.__dict__, "_folded": None}


class LayerProjections(nn.ModuleList):
    """One projection per layer."""

    def named_modules(self, memo=None, prefix: str = "", remove_duplicate: bool = True):
        """List the projections alone: peft would take a list named `text_projection` for CLIP's own projection."""
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if module is not self:
                yield name, module


class MadtpAlignment(nn.Module):
    """The alignment tokens (T, E) that both branches share, and projections for branches of another width.

    A model family with one projection per layer overrides `make_projection`; `forward` then returns a list with one
    entry per layer.
    """

    def __init__(self, config):
        super().__init__()
        width = config.alignment_dim or config.text_config.hidden_size
        self.tokens = nn.Parameter(torch.empty(config.num_alignment_tokens, width))
        self.vision_projection = self.make_projection(config.vision_config, width)
        self.text_projection = self.make_projection(config.text_config, width)

    def make_projection(self, branch, width: int) -> nn.Module | None:
        """Return the projection from a branch (given by its configuration) to the alignment tokens' width, if needed.

        A `ModuleList` holds one projection per layer.
        """
        return None if branch.hidden_size == width else AlignmentProjection(branch.hidden_size, width)

    def forward(
        self, modality: str | None, folded: bool = False
    ) -> AlignmentTokens | list[AlignmentTokens] | torch.Tensor:
        """Return the alignment tokens and projections for the layers of a branch, `"vision"` or `"text"`.

        Without a modality, returns a zero that depends on every parameter, so that each gets a gradient. Parameters
        are read by calling their modules, because hooks on these load offloaded parameters.
        """
        projections = {"vision": self.vision_projection, "text": self.text_projection}
        if modality is None:
            nothing = 0.0 * self.tokens.sum()
            for branch in projections.values():
                for projection in branch if isinstance(branch, nn.ModuleList) else [branch]:
                    if projection is not None:
                        zeros = self.tokens.new_zeros(1, projection.in_features)
                        nothing = nothing + 0.0 * projection(zeros).sum()
            return nothing
        branch = projections[modality]
        if isinstance(branch, nn.ModuleList):
            return [self._compared(projection, folded) for projection in branch]
        return self._compared(branch, folded)

    def _compared(self, projection: nn.Module | None, folded: bool) -> AlignmentTokens:
        if not folded:
            return AlignmentTokens(self.tokens, projection)
        if projection is None:
            return AlignmentTokens(self.tokens, weight=self.tokens)
        return AlignmentTokens(self.tokens, projection, *projection(alignment_tokens=self.tokens))


class PrunedModelMixin:
    """Adds pruning to a `PreTrainedModel` whose configuration is a `PruningConfigMixin`.

    The alignment tokens are in `alignment`.
    """

    task = None  # as `madtp_hf.count_flops` names it
    _dense_classes = ()  # transformers' classes that this one converts from
    _new_in_task = ("alignment.",)  # parts of names of parameters that the dense classes lack
    _fused_activations: dict[type, tuple[str, str]] = {}  # module class -> names of its map and activation
    _roles = {"vision": TokenRoles(), "text": TokenRoles()}
    _min_kept = 1
    _reduction_method = None  # replaces MADTP if set
    inference_precision = None  # what `prepare_for_inference` has prepared
    _alignment_class = MadtpAlignment
    # `save_pretrained` saves the modeling code for `AutoModel`. A task adds its own auto class and pipeline, if it has
    # them.
    _auto_class = "AutoModel"
    _task_auto_class = None
    _task_pipeline = None
    # False, because the loss is a mean over this batch: `Trainer` must divide it by its accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config):
        super().__init__(config)
        for branch in (config.vision_config, config.text_config):
            if branch._attn_implementation is None:  # inherits the whole model's
                branch._attn_implementation = config._attn_implementation
        self.model_tags = list(self.model_tags)  # `add_model_tags` and `push_to_hub(tags=...)` add to it
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
        self.alignment = self._alignment_class(config)

    # Pruning

    def set_pruning(
        self, *args, temperature: float | None = None, reduction: float | None = None, factor: float | None = None
    ) -> None:
        """Set how much the model prunes, from the next forward pass on. The setting is stored in the configuration.

        `set_pruning(None)` turns pruning off.

        Args:
            temperature (`float`, *optional*):
                The threshold's temperature: 0 is off, larger values prune more. `None`, without a reduction, is off.
            reduction (`float`, *optional*):
                The share of FLOPs to save, in [0, 1), by the schedule that `madtp_hf.calibrate` has measured.
            factor (`float`, *optional*):
                Multiplies the threshold of a given temperature, in (0, 1]: smaller values prune less. The default is
                1, as in the paper.

        Raises:
            TypeError: if a number is passed without its name.
            ValueError: if a value can't be set; the model is then unchanged.
        """
        if args and args != (None,):
            raise TypeError(
                f"set_pruning got {', '.join(map(repr, args))} without a name: expected"
                f" set_pruning(reduction={args[0]!r}), a share of the"
                f" FLOPs to save, or set_pruning(temperature={args[0]!r}), a threshold's temperature;"
                " set_pruning(None) is off."
            )
        if temperature is not None and reduction is not None:
            raise ValueError(f"Both {temperature=} and {reduction=} were given: expected one of them.")
        if factor is not None and temperature is None:
            raise ValueError(f"{factor=} was given without a temperature: expected both, or neither.")
        if reduction is not None:
            temperature, factor = self.config.threshold_for(reduction)
        before = (self.config.pruning_temperature, self.config.pruning_threshold_factor)
        try:
            self.config.pruning_temperature = 0.0 if temperature is None else temperature
            self.config.pruning_threshold_factor = 1.0 if factor is None else factor
            if self.is_pruning:
                self.config.token_counts()
        except ValueError:
            self.config.pruning_temperature, self.config.pruning_threshold_factor = before
            raise

    @property
    def is_pruning(self) -> bool:
        """Whether pruning is on. If it is off, the model computes what transformers' model does."""
        return self.config.pruning_temperature > 0

    def set_reduction_method(self, method: Callable[..., TokenReduction | None] | None) -> None:
        """Reduce tokens by another method than MADTP, from the next forward pass on. The method is not saved.

        To add a method, derive from `encoder.TokenReduction`; its `choose` returns for each layer which tokens stay,
        where each of the others goes, and with what weight. A variant of MADTP derives from `encoder.MadtpReduction`
        and is created by `madtp_reduction`.

        The temperature still decides how the text is computed: at 0 with padding, as in transformers, above 0 without
        padding. A method that reduces the text needs a temperature above 0.

        Args:
            method (`Callable` or `None`):
                A function `method(model, modality, with_feature)`, called in each forward pass for each branch,
                `"vision"` or `"text"`. It returns a new `TokenReduction` for that pass, or `None` if the branch stays
                dense. `with_feature` tells whether the loss needs an alignment feature. `None` restores MADTP.

        Raises:
            TypeError: if `method` is neither callable nor `None`.
        """
        if method is not None and not callable(method):
            raise TypeError(
                f"set_reduction_method got {method!r}: expected a function of (model, modality, with_feature) that"
                " returns a TokenReduction"
                " or None, or None for MADTP."
            )
        self._reduction_method = method

    def madtp_reduction(
        self, modality: str, with_feature: bool, reduction_class: Callable[..., TokenReduction] = MadtpReduction
    ) -> TokenReduction | None:
        """Create MADTP's reduction of a branch for one forward pass, with the options of the configuration.

        Args:
            modality (`str`):
                The branch, `"vision"` or `"text"`.
            with_feature (`bool`):
                Whether the loss needs the alignment feature.
            reduction_class (`Callable`, *optional*, defaults to `MadtpReduction`):
                `MadtpReduction`, or a variant of it.

        Returns:
            The reduction, or `None` if the branch stays dense.
        """
        config = self.config
        prunes = modality in config.pruning_modalities
        if not self.is_pruning or not (prunes or with_feature):
            return None
        counts = config.token_counts()
        return reduction_class(
            self.alignment(modality, folded=not with_feature),
            float(config.pruning_temperature) if prunes else 0.0,
            config.pruning_granularity,
            with_feature,
            self._roles[modality],
            None if counts is None or not prunes else counts[modality],
            self._min_kept,
            float(config.pruning_threshold_factor),
        )

    def _reduction(self, modality: str, with_feature: bool) -> TokenReduction | None:
        """Create the reduction of a branch for one forward pass, None for a dense branch.

        The configuration is read here, and not in the layers.
        """
        if self._reduction_method is not None:
            reduction = self._reduction_method(self, modality, with_feature)
            if reduction is not None:
                reduction.roles = self._roles[modality]  # the host decides which tokens are protected
            return reduction
        return self.madtp_reduction(modality, with_feature)

    def _alignment_loss(self, image_feature: torch.Tensor | None, text_feature: torch.Tensor | None) -> torch.Tensor:
        """Compute the alignment loss, 0 if a branch has no feature, as with pruning off.

        The 0 depends on all alignment parameters, because distributed training waits for the gradient of each.
        """
        if image_feature is None or text_feature is None:
            return self.alignment(None)
        return alignment_loss(image_feature, text_feature)

    # Arguments of `forward`

    def _vision_outputs(self, output_hidden_states, output_attentions, output_positions) -> dict:
        """Return which outputs the vision encoder computes: `forward`'s arguments, else the configuration's."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions:
            self._check_keeps_maps()
        return {
            "output_hidden_states": output_hidden_states,
            "output_positions": output_positions,
            "output_attentions": bool(output_attentions),
        }

    def _check_keeps_maps(self) -> None:
        used = {part._attn_implementation for part in (self.config.vision_config, self.config.text_config)}
        if used != {"eager"}:
            raise ValueError(
                f"output_attentions=True with attn_implementation={used.pop()!r}: attention maps are kept by"
                ' "eager" attention alone. Call model.set_attn_implementation("eager") first.'
            )

    def _check_arguments(self, unknown: dict) -> None:
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

    # Inference

    def prepare_for_inference(self, precision: str | None = "auto"):
        """Prepare the model for fast inference; outputs are those of the weights as they are whenever it runs.

        On a CPU, linear maps in a transformer's layers multiply by prepared weights: prepacked in float32 or bfloat16,
        or quantized to int8 per channel, with states quantized per token. Everything else (embeddings, norms, the
        choice of tokens, heads) stays float32, small weights stay as they are, and so do parameters and saved
        checkpoints. Prepared weights take memory of their own; that of weights mapped from a checkpoint's file is
        released. They are used in evaluation mode without gradients, and prepared anew when a weight has changed.

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

    # From a dense model

    @classmethod
    def _from_dense(cls, source, config_overrides: dict, config_class, method: str):
        """Convert transformers' model for the same task, or a path or Hub id of one.

        Only the alignment parameters are new.
        """
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
        saved = classes[0].config_class.get_config_dict(source, **found)[0].get("architectures") or []
        dense_class = next((c for c in classes if c.__name__ in saved), classes[0])
        try:
            dense, info = dense_class.from_pretrained(source, output_loading_info=True, **loading)
        except TypeError as error:
            if not any(name in str(error) for name in loading):
                raise
            raise TypeError(
                f"{cls.__name__}.{method} got {', '.join(loading)}: expected fields of the configuration or what"
                " `from_pretrained` takes."
            ) from error
        amiss = [str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
        if amiss:
            raise ValueError(
                f"{source} is no checkpoint of a {expected}: {len(amiss)} of its tensors are missing, not"
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
    from accelerate import dispatch_model, infer_auto_device_map

    if isinstance(device_map, str):
        device_map = infer_auto_device_map(model, no_split_module_classes=model._no_split_modules)
    return dispatch_model(model, device_map)


@torch.no_grad()
def init_alignment(module: MadtpAlignment) -> None:
    """Initialise the alignment tokens at random, with norms that fall geometrically to a hundredth of the first.

    At a given temperature, an alignment token of small norm attends to all tokens equally, and one of large norm only
    to its best match. The threshold is the smallest importance that they average. With graded norms it moves smoothly
    from the lowest importance to the mean, so that an untrained model reaches both small and large reductions.
    """
    scale = torch.logspace(0, -2, module.tokens.shape[0], device=module.tokens.device)
    init.copy_(module.tokens, torch.randn_like(module.tokens) * scale.unsqueeze(1))
