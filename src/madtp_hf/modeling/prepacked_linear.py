"""Linear maps with weights prepacked for oneDNN, for inference on a CPU.

A pruned model multiplies few rows at a time, so an ordinary matrix product spends its time on loading weights.
Prepacked weights are stored in the order in which they are used and load up to twice as fast. The copy takes as much
memory as the weights. The activation after a wide map is applied while the map's result is still in cache, which saves
a copy of the widest hidden states.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUActivation


# Weights of at least this many elements always gain from prepacking. Smaller ones stay in cache unpacked, and oneDNN's
# preparation for each new number of rows costs more than a small map saves.
LARGE = 2**18


def can_prepack() -> bool:
    """Return whether this build of torch can prepack weights."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def _same_map(linear: nn.Linear, cls: type[nn.Linear]) -> nn.Linear:
    """Return a map of class `cls` that shares the parameters of `linear`."""
    other = cls.__new__(cls)
    nn.Module.__init__(other)
    other.in_features, other.out_features, other.training = linear.in_features, linear.out_features, linear.training
    other.weight, other.bias = linear.weight, linear.bias
    return other


class PrepackedLinear(nn.Linear):
    """A linear map that uses a prepacked copy of its weight for float32 inference on a CPU.

    The weight is prepacked lazily, and repacked when it changes, also in place. A change that bypasses autograd,
    through `weight.data`, goes unnoticed until the model is moved, set to training or prepacked again.
    """

    plain_class: type[nn.Linear] = nn.Linear
    _packed = _packed_from = None

    def forward(self, states: torch.Tensor, activation: nn.Module | None = None) -> torch.Tensor:
        """Apply the map and, if given, `activation`, the exact GELU that follows it."""
        weight = self.weight
        # Not while training: gradient checkpointing runs a layer without gradients and then again with them, and both
        # runs must give the same result.
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
            # Written to `__dict__`, so that nn.Module does not register the copy in the state dict.
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
        # Copied and unpickled models prepack their own weights.
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_packed")}


def _is_exact_gelu(module) -> bool:
    if isinstance(module, GELUActivation):
        return module.act is F.gelu
    return isinstance(module, nn.GELU) and module.approximate == "none"


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


class FusedFeedForward(nn.Module):
    """Replaces a `plain` module that consists of a map, the exact GELU after it and, optionally, a second map.

    It has the same children. The first map applies the activation, unless something else, such as an adapter, has
    replaced that map.
    """

    def __init__(self, plain: nn.Module, linear: str, activation: str):
        super().__init__()
        self.training, self.linear, self.activation = plain.training, linear, activation
        self.second = next((name for name in plain._modules if name not in (linear, activation)), None)
        # Written to `__dict__`, so that both modules share their children: what replaces a child in one replaces it in
        # the other, and each parameter has a single name.
        self.__dict__["plain"] = plain
        self.__dict__["_modules"] = plain._modules

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        linear, activation = self._modules[self.linear], self._modules[self.activation]
        if type(linear) is PrepackedLinear and _can_fuse(activation) and not _has_hooks(linear):
            states = linear(states, activation)
        else:
            states = activation(linear(states))
        return states if self.second is None else self._modules[self.second](states)


def _can_fuse(activation: nn.Module) -> bool:
    return _is_exact_gelu(activation) and not _has_hooks(activation)


def prepack_linear_maps(
    model: nn.Module, classes: tuple[type, ...], activations: dict[type, tuple[str, str]], min_size: int = 0
) -> int:
    """Replace the linear maps of a model by `PrepackedLinear`, except those with hooks.

    Args:
        classes (`tuple[type, ...]`):
            The classes of linear maps to replace.
        activations (`dict[type, tuple[str, str]]`):
            For each class of modules that consist of a map, an activation and, optionally, a second map: the names of
            the first two, which are fused.
        min_size (`int`, *optional*, defaults to 0):
            Maps whose weights have fewer elements are not replaced.

    Returns:
        `int`: the number of bytes that the copies will take.
    """
    size = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is PrepackedLinear:
                child.drop_packed()
            elif type(child) in classes and child.weight.numel() >= min_size and not _has_hooks(child):
                prepacked = _same_map(child, PrepackedLinear)
                prepacked.plain_class = type(child)
                setattr(module, name, prepacked)
                child = prepacked
            else:
                names = activations.get(type(child))
                if names is not None and _can_fuse(getattr(child, names[1])) and not _has_hooks(child):
                    setattr(module, name, FusedFeedForward(child, *names))
                continue
            size += child.weight.numel() * child.weight.element_size()
    return size


def unpack_linear_maps(model: nn.Module) -> None:
    """Replace all prepacked maps by ordinary ones."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is PrepackedLinear:
                setattr(module, name, _same_map(child, child.plain_class))
            elif type(child) is FusedFeedForward:
                setattr(module, name, child.plain.train(child.training))
