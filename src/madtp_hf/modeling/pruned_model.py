"""What models that prune share, whatever their family: the alignment tokens, the switch for pruning, the way in from a dense model."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

from .attention import TokenRoles
from .encoder import AlignmentTokens, MadtpReduction, TokenReduction
from .prepacked_linear import can_prepack, prepack_linear_maps, unpack_linear_maps
from .token_pruning import alignment_loss


logger = logging.get_logger("transformers.models.madtp")


class AlignmentProjection(nn.Linear):
    """The map of a branch's tokens to the alignment tokens' width, which folds into the alignment tokens for inference."""

    def forward(self, states: torch.Tensor | None = None, alignment_tokens: torch.Tensor | None = None):
        """states (..., D) -> (..., E); or, given alignment tokens (T, E) instead, the weight (T, D) and the bias (T,) of the map that
        gives the scores at once: (x W^T + b) S^T = x (S W)^T + b S^T."""
        if alignment_tokens is None:
            return super().forward(states)
        return alignment_tokens @ self.weight, alignment_tokens @ self.bias


class MadtpAlignment(nn.Module):
    """The alignment tokens (T, E) that both branches share, and the maps to their width for branches of another."""

    def __init__(self, config):
        super().__init__()
        width = config.alignment_dim or config.text_config.hidden_size

        def projection(branch_width):
            return None if branch_width == width else AlignmentProjection(branch_width, width)

        self.tokens = nn.Parameter(torch.empty(config.num_alignment_tokens, width))
        self.vision_projection = projection(config.vision_config.hidden_size)
        self.text_projection = projection(config.text_config.hidden_size)

    def forward(self, modality: str | None, folded: bool = False) -> AlignmentTokens | torch.Tensor:
        """What the layers of a branch, "vision" or "text", compare their tokens with; without one, 0 with a gradient for each parameter.

        Parameters are read by calling their modules, whose hooks bring in what is offloaded.
        """
        projections = {"vision": self.vision_projection, "text": self.text_projection}
        if modality is None:
            nothing = 0.0 * self.tokens.sum()
            for projection in projections.values():
                if projection is not None:
                    zeros = torch.zeros(1, projection.in_features, dtype=self.tokens.dtype, device=self.tokens.device)
                    nothing = nothing + 0.0 * projection(zeros).sum()
            return nothing
        projection = projections[modality]
        if not folded:
            return AlignmentTokens(self.tokens, projection)
        if projection is None:
            return AlignmentTokens(self.tokens, weight=self.tokens)
        if type(projection) is not AlignmentProjection:  # an adapter has taken its place
            return AlignmentTokens(self.tokens, projection)
        return AlignmentTokens(self.tokens, projection, *projection(alignment_tokens=self.tokens))


class PrunedModelMixin:
    """For a `PreTrainedModel` whose configuration is a `PruningConfigMixin`, and whose alignment tokens are in `alignment`."""

    task = None  # as `madtp_hf.count_flops` names it
    _dense_classes = ()  # transformers' models that a model of this class is made from
    _new_in_task = ("alignment.",)  # parameters that those don't have
    _prepacked_classes = (nn.Linear,)
    _fused_activations: dict[type, tuple[str, str]] = {}  # classes of modules: the names of a map and its activation
    _roles = {"vision": TokenRoles(), "text": TokenRoles()}
    _min_kept = 1
    _reduction_method = None  # instead of MADTP

    # Pruning

    def set_pruning(
        self, *args, temperature: float | None = None, reduction: float | None = None, factor: float | None = None
    ) -> None:
        """Set how much the model prunes, from the next forward pass on; the configuration keeps it. `set_pruning(None)` is off.

        Args:
            temperature (`float`, *optional*):
                The threshold's temperature: 0 is off, larger prunes more. `None`, without a reduction, is off.
            reduction (`float`, *optional*):
                The share of FLOPs to save, in [0, 1), by the schedule that `madtp_hf.calibrate` has measured.
            factor (`float`, *optional*):
                With a temperature, what the threshold is multiplied by, in (0, 1]: smaller prunes less. 1 if not given, as in the paper.

        Raises:
            TypeError: for a number without its name.
            ValueError: for a value that can't be set; the model is left as it was.
        """
        if args and args != (None,):
            raise TypeError(
                f"set_pruning got {', '.join(map(repr, args))} without a name: expected set_pruning(reduction={args[0]!r}), a share of the"
                f" FLOPs to save, or set_pruning(temperature={args[0]!r}), a threshold's temperature; set_pruning(None) is off."
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
        """Whether pruning is on. Where it is not, the model is transformers'."""
        return self.config.pruning_temperature > 0

    def set_reduction_method(self, method: Callable[..., TokenReduction | None] | None) -> None:
        """Reduce tokens by another method than MADTP, from the next forward pass on; `None` is MADTP again. It is not saved.

        To add a method, derive from `encoder.TokenReduction`, whose `choose` answers for each layer which tokens stay, where each of
        the others goes, and with what weight. A variant of MADTP derives from `encoder.MadtpReduction` and is made by `madtp_reduction`.

        Args:
            method (`Callable` or `None`):
                `method(model, modality, with_feature)`, called once for each branch, "vision" or "text", and forward pass, returns the
                branch's `TokenReduction`, a new one in each pass, or `None` for a branch that stays dense. `with_feature` tells
                whether the loss takes an alignment feature, should the method have one.

        The temperature remains what decides how the text is computed: at 0 with its padding, as transformers does, above 0 without. A
        method that reduces the text needs a temperature above 0.
        """
        if method is not None and not callable(method):
            raise TypeError(
                f"set_reduction_method got {method!r}: expected a function of (model, modality, with_feature) that returns a TokenReduction"
                " or None, or None for MADTP."
            )
        self._reduction_method = method

    def madtp_reduction(
        self, modality: str, with_feature: bool, reduction_class: Callable[..., TokenReduction] = MadtpReduction
    ) -> TokenReduction | None:
        """MADTP, or the variant of it that `reduction_class` is, as the configuration says: for one branch and forward pass; `None`
        where the branch stays dense."""
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
        """How the tokens of a branch become fewer in the pass that begins, None if they don't: the configuration is read here, and in no
        layer."""
        if self._reduction_method is not None:
            return self._reduction_method(self, modality, with_feature)
        return self.madtp_reduction(modality, with_feature)

    def _alignment_loss(self, image_feature: torch.Tensor | None, text_feature: torch.Tensor | None) -> torch.Tensor:
        """0 where a branch has no feature, as with pruning off: the alignment parameters still get a gradient, as distributed training
        waits for one from each."""
        if image_feature is None or text_feature is None:
            return self.alignment(None)
        return alignment_loss(image_feature, text_feature)

    # Inference on a CPU

    def prepack_weights(self, prepacked: bool = True):
        """Prepack the weights of linear maps for fast inference on a CPU in float32, or, with `prepacked=False`, no longer.

        Outputs are the same to rounding; what is saved doesn't change. It takes as much memory again as the weights. Training, other
        devices and other types go on with the weights as they are.

        Returns:
            The model itself.

        Raises:
            RuntimeError: if torch was built without oneDNN.
        """
        if not prepacked:
            unpack_linear_maps(self)
            return self
        if not can_prepack():
            raise RuntimeError(
                "prepack_weights needs torch with oneDNN, and this one has none: expected a build where torch.backends.mkldnn.is_available();"
                " go on without, the model runs as it is."
            )
        size = prepack_linear_maps(self, self._prepacked_classes, self._fused_activations)
        logger.info(f"Weights of linear maps are prepacked for this CPU, which takes {size / 2**20:.0f} MiB more.")
        return self

    def pack_weights(self, packed: bool = True):
        """The former name of `prepack_weights`."""
        return self.prepack_weights(packed)

    def prepack_for_inference(self):
        """Prepack weights where that helps, and do nothing where it doesn't: what pipelines and commands call. Returns the model."""
        on_cpu = self.device.type == "cpu" and self.dtype == torch.float32
        return self.prepack_weights() if on_cpu and can_prepack() and not self.training else self

    # From a dense model

    @classmethod
    def _from_dense(cls, source, config_overrides: dict, config_class, method: str):
        """A model of this class from transformers' model for the same task, or a path or Hub id of one; only alignment is new."""
        classes = (*cls._dense_classes, cls)
        expected = " or a ".join(dense_class.__name__ for dense_class in classes)
        defaults = config_class()
        overrides = {name: value for name, value in config_overrides.items() if hasattr(defaults, name)}
        loading = {name: value for name, value in config_overrides.items() if name not in overrides}
        attention, device_map = (loading.pop(name, None) for name in ("attn_implementation", "device_map"))
        if not isinstance(source, PreTrainedModel):
            source = cls._load_dense(source, classes, expected, loading, method)
        elif loading:
            raise TypeError(
                f"{cls.__name__}.{method} got {', '.join(loading)}: no such field in {config_class.__name__}; options of loading go with a path"
                " or Hub id, and this is a model already."
            )
        if not isinstance(source, classes):
            raise TypeError(
                f"{cls.__name__}.{method} got a {type(source).__name__}: expected a {expected}, or a path or Hub id of one."
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
                f"{cls.__name__}.{method} got {', '.join(loading)}: expected fields of the configuration or what `from_pretrained` takes."
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
    """Move a model where a `device_map`, as `from_pretrained` takes it, says."""
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
    """Random alignment tokens of graded norms, from large to a hundredth of that.

    At a temperature, alignment tokens of small norm look at all tokens alike and those of large norm at their likeliest alone: graded
    norms let the threshold, the least of what they see, move smoothly from the lowest importance to the mean, so that an untrained
    model reaches small reductions and large ones.
    """
    scale = torch.logspace(0, -2, module.tokens.shape[0], device=module.tokens.device)
    init.copy_(module.tokens, torch.randn_like(module.tokens) * scale.unsqueeze(1))
