"""Linear maps with their weights laid out in advance for oneDNN, for inference on a CPU.

A pruned model multiplies few rows at a time, where an ordinary matrix product spends its time on fetching weights. Laid out in the order in which they are
used, they are fetched up to twice as fast. The copy costs as much memory as the weights.
"""

import torch
from torch import nn


def can_pack() -> bool:
    """Whether this build of torch has what it takes."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


class PackedLinear(nn.Linear):
    """A linear map that keeps a copy of its weight for oneDNN, and uses it where it serves: float32 on a CPU, without gradients.

    It makes the copy when it is first used and anew when the weight has changed, be it in place; what is written past autograd, through
    `weight.data`, goes unseen until the model is moved, set to train or packed again.
    """

    _packed = _packed_from = None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
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
            return super().forward(states)
        version = 0 if weight.is_inference() else weight._version
        now = (id(weight), weight.data_ptr(), version)
        if self._packed_from != now:
            # Past nn.Module's own bookkeeping: it belongs to no state dictionary.
            self.__dict__["_packed"] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
            self.__dict__["_packed_from"] = now
        return torch.ops.mkldnn._linear_pointwise(states, self._packed, self.bias, "none", [], "")

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


def pack_linear_maps(model: nn.Module, packed: bool = True) -> None:
    """Make every plain linear map of a model a `PackedLinear`, whose copy is made anew, or plain again."""
    for module in model.modules():
        if type(module) is PackedLinear:
            module.drop_packed()
        if type(module) is (nn.Linear if packed else PackedLinear):
            module.__class__ = PackedLinear if packed else nn.Linear
