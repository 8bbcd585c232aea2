"""Linear maps prepared for inference on a CPU: weights prepacked for oneDNN in float32 or bfloat16, or in int8.

A pruned model multiplies few rows at a time, so a product spends its time on loading weights. Prepacked weights are
stored in the order in which they are used; bfloat16 and int8 also have fewer bytes to load.

Modules, parameters and checkpoints stay as they are: a prepared map is the same `nn.Linear` with a `forward` of its
own, so that whatever adapts, quantizes or replaces linear maps finds them.
"""

import ctypes
import functools
import mmap
import platform
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer


PRECISIONS = ("float32", "bfloat16", "int8")
# Weights of at least this many elements always gain. Smaller ones stay in cache, and oneDNN's preparation for each new
# number of rows costs more than a small map saves.
LARGE = 2**18
# On Intel's processors, float32 products of at least MANY_ROWS or at most FEW_ROWS rows use MKL instead of prepacked
# weights. MKL is 1.3 times as fast at 577 rows, those of a 384-pixel image, and at up to 3 rows, those of a decoder's
# step. On other processors it is slower.
MANY_ROWS, FEW_ROWS = 256, 3
SAMPLED_ROWS, SAMPLED_COLUMNS = 2, 32  # few rows: what a system reads around each, from a file, stays in memory
MADV_PAGEOUT = 21  # Linux: memory that a file backs is read from it again when needed


def can_prepack() -> bool:
    """Return whether this build of torch can prepack weights."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def check_kernels(precision: str) -> None:
    """Raise a RuntimeError if this build of torch lacks the kernels of a precision on a CPU."""
    if precision == "int8" and torch.backends.quantized.engine == "none":
        raise RuntimeError(
            "precision='int8' needs quantized operators, which this build of torch lacks: expected one where"
            " torch.backends.quantized.engine is not 'none'. Without it, the model still runs."
        )
    if precision != "int8" and not can_prepack():
        raise RuntimeError(
            f"{precision=} needs oneDNN, which this build of torch lacks: expected one where"
            " torch.backends.mkldnn.is_available(). Without it, the model still runs."
        )


class Source:
    """The tensors that a prepared weight was computed from; `is_current` tells whether they still have those values.

    Autograd counts changes in place, but not those through `.data`, as by an average of weights or by the merging of
    an adapter. Those change all of a tensor, so on a CPU a few of its elements are compared.
    """

    def __init__(self, *tensors: torch.Tensor):
        self.stamps = [_stamp(tensor) for tensor in tensors]
        self.samples = [_sample(tensor) for tensor in tensors if tensor.device.type == "cpu"]
        self.values = [sample.clone() for sample in self.samples]

    def is_current(self, *tensors: torch.Tensor) -> bool:
        return all(map(_is_stamped, tensors, self.stamps)) and all(map(torch.equal, self.samples, self.values))


def _stamp(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.dtype


def _is_stamped(tensor: torch.Tensor, stamp: tuple) -> bool:
    return _stamp(tensor) == stamp


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of some elements of a matrix, or of a whole bias; comparing it reads the tensor's memory."""
    tensor = tensor.detach()
    return tensor[:: -(-len(tensor) // SAMPLED_ROWS), :SAMPLED_COLUMNS] if tensor.ndim == 2 else tensor


# The products: each function prepares a weight (N, K) and returns a function of states (..., K), the bias (N,) and
# whether to apply the exact GELU to the result (..., N).


@functools.cache
def _is_intel() -> bool:
    try:
        with open("/proc/cpuinfo") as lines:
            return any("GenuineIntel" in line for line in lines if line.startswith("vendor_id"))
    except OSError:  # a system other than Linux
        return "GenuineIntel" in platform.processor()


def reorder(weight: torch.Tensor) -> torch.Tensor:
    """Lay out a weight (N, K) as oneDNN's product reads it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def _prepack(weight: torch.Tensor):
    packed, width = None, weight.shape[1]
    takes_mkl = weight.dtype == torch.float32 and torch.backends.mkl.is_available() and _is_intel()
    if not takes_mkl:
        packed, weight = reorder(weight), None  # nothing keeps a copy in another precision

    def product(states, bias, gelu):
        nonlocal packed
        if takes_mkl and not FEW_ROWS < states.numel() // width < MANY_ROWS:
            result = F.linear(states, weight, bias)
            return torch.ops.aten.gelu_(result) if gelu else result
        if packed is None:
            packed = reorder(weight)
        fused = ("gelu", [], "none") if gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(states, packed, bias, *fused)

    return product


def _quantize(weight: torch.Tensor):
    """Quantize a weight per output channel, and states per token when they are multiplied."""
    least, most = torch.aminmax(weight, dim=1)
    scales = torch.maximum(-least, most).double().clamp_(min=1e-12) / 127
    quantized = torch.quantize_per_channel(weight, scales, torch.zeros_like(scales, dtype=torch.long), 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    # Without VNNI, sums of two products of 8 bits may overflow.
    has_vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)()

    def product(states, bias, gelu):
        # The kernel has one scale for all rows: they are brought to the same range, and back.
        scale = states.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12)
        product = torch.ops.quantized.linear_dynamic(states / scale, packed, not has_vnni)
        product = product.mul_(scale) if bias is None else torch.addcmul(bias, product, scale, out=product)
        return F.gelu(product) if gelu else product

    return product


PRODUCTS = {
    "float32": (_prepack, torch.float32),
    "bfloat16": (_prepack, torch.bfloat16),
    "int8": (_quantize, torch.float32),
}


class PreparedForward:
    """The `forward` of a prepared linear map: without gradients on a CPU, it multiplies by the prepared weight.

    The weight is prepared when first used, and again when it has changed. Training, other devices, autocast and
    compilation use the map's own weight, as does a map whose weight was cast or is not a plain parameter any more.

    mapped_at: the address of the weight if it is mapped from a file: its memory is released once it is prepared.
    """

    def __init__(self, linear: nn.Linear, precision: str, mapped_at: int | None = None):
        self.linear, self.mapped_at, self.prepared = linear, mapped_at, None
        self.make, self.dtype = PRODUCTS[precision]
        self.weight_dtype = linear.weight.dtype

    def __call__(self, states: torch.Tensor, gelu: bool = False, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Apply the map and, if asked, the exact GELU after it; the result has the states' dtype, or `dtype`."""
        linear = self.linear
        weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
        can_use = (
            not linear.training
            and type(weight) is nn.Parameter
            and weight.device.type == "cpu"
            and weight.dtype == self.weight_dtype
        )
        if not can_use:
            self.prepared = None
        if not can_use or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            states = type(linear).forward(linear, states)
            return F.gelu(states) if gelu else states
        prepared = self.prepared
        if prepared is None or not prepared[0].is_current(weight):
            prepared = self.prepare()
        result = prepared[1](states.to(self.dtype), None if bias is None else bias.float(), gelu)
        return result.to(states.dtype if dtype is None else dtype)

    @torch.no_grad()
    def prepare(self) -> tuple:
        weight = self.linear.weight
        prepared = Source(weight), self.make(weight.detach().to(self.dtype))
        if self.mapped_at == weight.data_ptr():
            release(weight)
        self.prepared = prepared
        return prepared

    def __getstate__(self):
        # Copied and unpickled models prepare weights of their own.
        return {**self.__dict__, "mapped_at": None, "prepared": None}


def keep_dtype(*maps: nn.Module) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Return functions that apply an attention's projections; their results keep the products' dtype.

    So attention computes in bfloat16 where the projections do, and nothing is cast in between. If one of the maps is
    not prepared, such as one that an adapter has wrapped, all cast their results as usual.
    """
    if all(_is_prepared(map) and not _has_hooks(map) for map in maps):
        return [functools.partial(map.forward, dtype=map.forward.dtype) for map in maps]
    return list(maps)


class FusedForward:
    """The `forward` of a module that consists of a map, an activation and, optionally, a second map.

    The first map applies the activation if it is the exact GELU, and its result keeps the dtype of the second's
    product. Wherever something else, such as an adapter, has taken the place of one of them, each runs by itself.
    """

    def __init__(self, module: nn.Module, first: str, activation: str):
        self.module, self.first, self.activation = module, first, activation
        self.second = next((name for name in module._modules if name not in (first, activation)), None)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        modules = self.module._modules
        first, activation, second = modules[self.first], modules[self.activation], modules.get(self.second)
        dtype = states.dtype
        if _is_prepared(first) and _is_exact_gelu(activation) and not (_has_hooks(first) or _has_hooks(activation)):
            keeps = _is_prepared(second) and not _has_hooks(second)
            states = first.forward(states, True, first.forward.dtype if keeps else dtype)
        else:
            states = activation(first(states))
        return states if second is None else second(states).to(dtype)


def _is_prepared(module: nn.Module | None) -> bool:
    return module is not None and type(module.__dict__.get("forward")) is PreparedForward


def _is_exact_gelu(module: nn.Module) -> bool:
    if isinstance(module, GELUActivation):
        return module.act is F.gelu
    return isinstance(module, nn.GELU) and module.approximate == "none"


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def prepare_linear_maps(model: nn.Module, precision: str, fused: dict[type, tuple[str, str]]) -> None:
    """Prepare the large linear maps of a model; undo what was prepared before.

    Only maps in a transformer's layers get another precision than float32: embeddings, heads and projections of
    features keep it.

    Args:
        precision (`str`): One of `PRECISIONS`.
        fused (`dict[type, tuple[str, str]]`):
            For each class of modules that consist of a map, an activation and, optionally, a second map: the names of
            the first two.
    """
    restore_linear_maps(model)
    mapped = _mapped_addresses()
    in_layers = {
        part for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer) for part in layer.modules()
    }
    for module in model.modules():
        if "forward" in module.__dict__:  # something else, such as accelerate's offloading, has replaced it
            continue
        weight = module._parameters.get("weight")
        # A subclass that multiplies in its own way, such as one of a quantization library, is left alone.
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and _is_large(weight):
            address = weight.data_ptr()
            mapped_at = address if any(start <= address < end for start, end in mapped) else None
            module.forward = PreparedForward(module, precision if module in in_layers else "float32", mapped_at)
            if module not in in_layers and precision != "float32" and not module.training:
                # The largest, such as a head of all words, at once: while the others take no memory yet.
                module.forward.prepare()
        elif type(module) in fused:
            module.forward = FusedForward(module, *fused[type(module)])


def _is_large(weight: torch.Tensor | None) -> bool:
    is_plain = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.is_floating_point()
    return is_plain and weight.numel() >= LARGE


def restore_linear_maps(model: nn.Module) -> None:
    """Undo `prepare_linear_maps`."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), (PreparedForward, FusedForward)):
            del module.forward


def _mapped_addresses() -> list[tuple[int, int]]:
    """Return the address ranges of this process that are mapped from files; none on systems other than Linux."""
    if sys.platform != "linux":
        return []
    with open("/proc/self/maps") as lines:
        fields = [line.split(maxsplit=5) for line in lines]
    ranges = [field[0].split("-") for field in fields if len(field) == 6 and field[5].startswith("/")]
    return [(int(start, 16), int(end, 16)) for start, end in ranges]


def release(weight: torch.Tensor) -> None:
    """Free the memory of a weight that is mapped from a file; whoever reads the weight reads it from there again."""
    page = mmap.PAGESIZE
    start = -(-weight.data_ptr() // page) * page
    end = (weight.data_ptr() + weight.numel() * weight.element_size()) // page * page
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_PAGEOUT)
