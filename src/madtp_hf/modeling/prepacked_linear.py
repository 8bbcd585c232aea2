"""Linear maps with their weights prepacked for oneDNN, for inference on a CPU.

A pruned model multiplies few rows at a time, where an ordinary matrix product spends its time on fetching weights. Prepacked, in the
order in which they are used, they are fetched up to twice as fast. The copy costs as much memory as the weights. The activation
behind a wide map is applied while its result is still in cache, which spares a copy of the widest states there are.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUActivation


def can_prepack() -> bool:
    """Whether this build of torch has what it takes."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def _same_map(linear: nn.Linear, cls: type[nn.Linear]) -> nn.Linear:
    """A map of class `cls` that shares the parameters of `linear`."""
    other = cls.__new__(cls)
    nn.Module.__init__(other)
    other.in_features, other.out_features, other.training = linear.in_features, linear.out_features, linear.training
    other.weight, other.bias = linear.weight, linear.bias
    return other


class PrepackedLinear(nn.Linear):
    """A linear map that uses a prepacked copy of its weight where it serves: float32 on a CPU, without gradients.

    The weight is prepacked lazily, and repacked when it changes, be it in place; what is written past autograd, through `weight.data`,
    goes unseen until the model is moved, set to train or prepacked again.
    """

    activation: nn.Module  # the exact GELU behind the map, if it has taken it over; a class attribute would hide the module
    plain_class: type[nn.Linear] = nn.Linear
    _packed = _packed_from = None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        weight, activation = self.weight, self._modules.get("activation")
        # Not while training: checkpointed layers run with gradients off, and are run again with them on, which has to give the same.
        if (
            self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or weight.device.type != "cpu"
            or not weight.dtype == states.dtype == torch.float32
            or torch.is_autocast_enabled("cpu")
        ):
            states = F.linear(states, weight, self.bias)
            return states if activation is None else activation(states)
        version = 0 if weight.is_inference() else weight._version
        now = (id(weight), weight.data_ptr(), version)
        if self._packed_from != now:
            # Past nn.Module's own bookkeeping: it belongs to no state dictionary.
            self.__dict__["_packed"] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
            self.__dict__["_packed_from"] = now
        fused = ("none", [], "") if activation is None else ("gelu", [], "none")
        return torch.ops.mkldnn._linear_pointwise(states, self._packed, self.bias, *fused)

    def drop_packed(self) -> None:
        for name in ("_packed", "_packed_from"):
            self.__dict__.pop(name, None)

    def train(self, mode: bool = True):
        if mode:
            self.drop_packed()
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self.drop_packed()
        return super()._apply(*args, **kwargs)

    def __getstate__(self):
        # Copies of the model, and what is pickled of it, make their own.
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_packed")}


class FusedActivation(nn.Module):
    """Stands where an activation was that the map before it applies now."""

    def __init__(self, activation: nn.Module):
        super().__init__()
        self.activation = activation

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states


def _is_exact_gelu(module) -> bool:
    if isinstance(module, GELUActivation):
        return module.act is F.gelu
    return isinstance(module, nn.GELU) and module.approximate == "none"


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def prepack_linear_maps(model: nn.Module, classes: tuple[type, ...], activations: dict[type, tuple[str, str]]) -> int:
    """Put a `PrepackedLinear` in the place of each linear map of one of these `classes`; maps with hooks stay as they are.

    activations: for a class of modules, the names of its map and of the activation behind it, to be applied together.

    Returns how many bytes the copies will take.
    """
    size = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is PrepackedLinear:
                child.drop_packed()
            elif type(child) in classes and not _has_hooks(child):
                prepacked = _same_map(child, PrepackedLinear)
                prepacked.plain_class = type(child)
                setattr(module, name, prepacked)
                child = prepacked
            else:
                continue
            size += child.weight.numel() * child.weight.element_size()
        linear, activation = activations.get(type(module), (None, None))
        if linear is not None and type(getattr(module, linear)) is PrepackedLinear:
            applied = getattr(module, activation)
            if _is_exact_gelu(applied):
                getattr(module, linear).activation = applied
                setattr(module, activation, FusedActivation(applied))
    return size


def unpack_linear_maps(model: nn.Module) -> None:
    """Make all maps ordinary ones again."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is PrepackedLinear:
                setattr(module, name, _same_map(child, child.plain_class))
            elif type(child) is FusedActivation:
                setattr(module, name, child.activation)
