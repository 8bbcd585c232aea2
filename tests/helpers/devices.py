"""Find tensors that are created on the default device instead of the inputs' device.

On a machine with only a CPU such a tensor raises no error. `with no_default_device():` makes it raise one.
"""

import inspect
from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode


def _is_on_a_device(value) -> bool:
    """Return whether `value` is a tensor, or another library's array from which torch takes the device."""
    return isinstance(value, torch.Tensor) or hasattr(value, "__cuda_array_interface__")


FACTORIES = {
    function: function.__name__
    for function in (
        torch.arange,
        torch.bartlett_window,
        torch.blackman_window,
        torch.empty,
        torch.empty_permuted,
        torch.empty_strided,
        torch.eye,
        torch.full,
        torch.hamming_window,
        torch.hann_window,
        torch.kaiser_window,
        torch.linspace,
        torch.logspace,
        torch.ones,
        torch.rand,
        torch.randint,
        torch.randn,
        torch.randperm,
        torch.range,
        torch.scalar_tensor,
        torch.sparse_coo_tensor,
        torch.tril_indices,
        torch.triu_indices,
        torch.zeros,
    )
}
# These take the device of a tensor argument.
CONVERSIONS = {function: function.__name__ for function in (torch.as_tensor, torch.asarray, torch.tensor)}

PASSED = ("torch", "transformers", "accelerate", "peft")


class no_default_device(TorchFunctionMode):
    """A context in which a factory call without `device` raises a `RuntimeError` that names function and caller.

    `torch.tensor`, `as_tensor` and `asarray` of a tensor are allowed, since they stay on its device. So are
    `zeros_like`, `new_zeros` and the like, and `normal(mean_tensor, ...)`. A call with `device=None` counts as a call
    without `device`. Calls from the modules in `PASSED` are allowed, since that code is not ours. The code of a
    checkpoint, in `transformers_modules`, is not exempt.
    """

    def __torch_function__(self, function: Callable, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = FACTORIES.get(function)
        if function in CONVERSIONS and not _is_on_a_device(args[0] if args else kwargs.get("data")):
            name = CONVERSIONS[function]
        if name is not None and kwargs.get("device") is None and kwargs.get("out") is None:
            caller = inspect.currentframe().f_back
            if caller.f_globals.get("__name__", "").partition(".")[0] not in PASSED:
                raise RuntimeError(
                    f"torch.{name} was called without a device in {caller.f_code.co_filename}, line "
                    f"{caller.f_lineno}: its result is on the default device. Expected device=, as of an input, or a "
                    "tensor's own new_ method."
                )
        return function(*args, **kwargs)
