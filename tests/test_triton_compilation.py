"""The kernels compile for the GPUs that they are made for and fit their shared memory; no GPU is needed."""

import os

import pytest
import torch

from madtp_hf.modeling import triton_kernels, triton_merging
from madtp_hf.modeling.triton_kernels import DTYPES, GATE_BLOCKS, MERGE_BLOCKS, block_sizes
from madtp_hf.modeling.triton_merging import MERGE_SIMILAR_BLOCKS, SIMILARITY_BLOCKS


triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402


# Compute capability -> kB of shared memory that a block may ask for (CUDA programming guide).
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
OF_DTYPE = {"query", "key", "value", "output", "scores", "states"}
INTEGERS = {"cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "new_cu_seqlens", "destination", "lengths"}
FLOATS = {"log_sums", "output_norm", "received", "pooled", "parts", "importance"}
FLOATS |= {"sizes", "mean_key", "ranked", "counts"}
ROLES = {"CAUSAL": True, "PROTECTS_LAST": True}


def compile_kernel(name, capability, dtype, constants, options):
    """Compile as for pointers and strides that are multiples of 16, as those of BLIP and CLIP are."""
    kernel = getattr(triton_kernels, name, None) or getattr(triton_merging, name)
    signature, attributes = {}, {}
    for place, parameter in enumerate(kernel.arg_names):
        if parameter in constants:
            signature[parameter] = "constexpr"
        elif parameter in OF_DTYPE | INTEGERS | FLOATS:
            of = NAMES[dtype] if parameter in OF_DTYPE else "i32" if parameter in INTEGERS else "fp32"
            signature[parameter] = "*" + of
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif parameter in ("scale", "temperature", "factor"):
            signature[parameter] = "fp32"
        else:
            signature[parameter] = "i32"
            if parameter.endswith(("_row", "_head")) and parameter != "scores_row":
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def split(blocks):
    """The kernel's own constants, and what the compiler is told."""
    options = {name: value for name, value in blocks.items() if name.startswith("num_")}
    return {name: value for name, value in blocks.items() if name not in options}, options


def kernels(dtype, width):
    attend, received = block_sizes(dtype, width)
    for sized in (False, True):
        optional = {"SIZED": sized} | ({} if sized else {"sizes": None})
        yield "_attend", {"WIDTH": width, "CAUSAL": True, "SCORED": True, **optional}, attend
        yield "_sum_received", {"HEADS": 12, "WIDTH": width, **ROLES, **optional}, received
        yield "_assign", {"WIDTH": width, "PROTECTS_LAST": True, **optional}, SIMILARITY_BLOCKS
    last, similar = {"PROTECTS_LAST": True}, {"WIDTH": width, "PROTECTS_LAST": True}
    statistics = {"NUM_COLUMNS": 100, "HEADS": 12, "HEADS_BLOCK": 16, **last}
    yield "_gate", statistics, GATE_BLOCKS
    yield "_merge", {"WIDTH": 768}, MERGE_BLOCKS
    yield "_mean_key", {"HEADS": 12, "WIDTH": width, "ROWS": SIMILARITY_BLOCKS["ROWS"]}, {}
    yield "_importance", statistics, GATE_BLOCKS
    yield "_rank", similar, SIMILARITY_BLOCKS
    yield "_select", {"NUM_COLUMNS": 100, **last}, GATE_BLOCKS
    precision = "tf32" if dtype == torch.bfloat16 else "ieee"
    yield "_merge_similar", {"WIDTH": 768, "PRECISION": precision}, MERGE_SIMILAR_BLOCKS


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    try:
        triton.knobs.nvidia.ptxas  # noqa: B018
    except (AttributeError, RuntimeError):
        pytest.skip("this triton has no ptxas of its own")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_compiles_and_fits(capability, dtype):
    for name, constants, blocks in kernels(dtype, 64):
        block_constants, options = split(blocks)
        compiled = compile_kernel(name, capability, dtype, constants | block_constants, options)
        print(f"{name} {NAMES[dtype]} sm_{capability}: {compiled.metadata.shared} bytes of shared memory")
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= SHARED_MEMORY[capability] * 1024
