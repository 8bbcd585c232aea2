"""Linear maps with their weights laid out in advance for oneDNN, for inference on a CPU.

A pruned model multiplies few rows at a time, where an ordinary matrix product spends its time on fetching weights. Laid out in the order in which they are
used, they are fetched up to twice as fast. The copy costs as much memory as the weights. The activation behind a wide map is applied while its result is
still in cache, which spares a copy of the widest states there are.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.blip.modeling_blip import BlipMLP


def can_pack() -> bool:
    """Whether this build of torch has what it takes."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


class PackedLinear(nn.Linear):
    """A linear map that keeps a copy of its weight for oneDNN, and uses it where it serves: float32 on a CPU, without gradients.

    It makes the copy when it is first used and anew when the weight has changed, be it in place; what is written past autograd, through
    `weight.data`, goes unseen until the model is moved, set to train or packed again.
    """

    _packed = _packed_from = None

    def forward(self, states: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        """`gelu`: whether to apply that activation as well."""
        weight = self.weight
        # Not while training: checkpointed layers run with gradients off, and are run again with them on, which has to give the same.
        if (
            self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or weight.device.type != "cpu"
            or not weight.dtype == states.dtype == torch.float32
            or torch.is_autocast_enabled("cpu")
        ):
            states = super().forward(states)
            return F.gelu(states) if gelu else states
        version = 0 if weight.is_inference() else weight._version
        now = (id(weight), weight.data_ptr(), version)
        if self._packed_from != now:
            # Past nn.Module's own bookkeeping: it belongs to no state dictionary.
            self.__dict__["_packed"] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
            self.__dict__["_packed_from"] = now
        activation = ("gelu", [], "none") if gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(states, self._packed, self.bias, *activation)

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


class PackedMLP(BlipMLP):
    """The vision tower's feed-forward layer, with map and activation in one where the map is a `PackedLinear`: an adapter may have taken its place."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if type(self.fc1) is PackedLinear and self.config.hidden_act == "gelu":
            return self.fc2(self.fc1(hidden_states, gelu=True))
        return super().forward(hidden_states)


PACKED_CLASSES = {nn.Linear: PackedLinear, BlipMLP: PackedMLP}


def pack_linear_maps(model: nn.Module, packed: bool = True) -> None:
    """Make every plain linear map of a model a `PackedLinear`, whose copy is made anew, and its MLPs `PackedMLP`s; or all of them plain again."""
    classes = PACKED_CLASSES if packed else {theirs: plain for plain, theirs in PACKED_CLASSES.items()}
    for module in model.modules():
        if type(module) is PackedLinear:
            module.drop_packed()
        module.__class__ = classes.get(type(module), type(module))
