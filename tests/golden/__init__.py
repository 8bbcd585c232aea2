"""Reads the committed golden cases: the published implementation's inputs, outputs and weights, see README.md.

The weights are random draws. They are stored as the draws' place in a stream of random numbers, which any machine can
draw again, and the remaining difference in units in the last place: every float32 comes back as it was recorded.
"""

import json
from pathlib import Path

import numpy as np


FOLDER = Path(__file__).parent
SEED = 7  # of the Mersenne twister that all of BLIP's weights were drawn from
CLIP_SEED = 1  # and CLIP's
DRAWS = 4_300_000  # as far into its stream as the last task's weights lie
BLOCK = 16  # torch turns this many uniform numbers at a time into normal ones


def uniform_stream(seed: int = SEED) -> np.ndarray:
    """The stream as torch takes it: float32 in [0, 1), the low 24 bits of each draw."""
    draws = np.random.RandomState(seed).randint(0, 2**32, size=DRAWS, dtype=np.uint32)
    return (draws & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """Normal numbers from uniform ones, by blocks: the first half of a block gives radii, the second one angles."""
    first, second = np.split(uniform.reshape(-1, BLOCK), 2, axis=1)
    # Logarithm, cosine and sine in float64, then rounded: float32 ones differ between machines.
    logarithm = np.log((np.float32(1) - first).astype(np.float64)).astype(np.float32)
    radius = np.sqrt(np.float32(-2) * logarithm)
    angle = (np.float32(2 * np.pi) * second).astype(np.float64)
    parts = [radius * function(angle).astype(np.float32) for function in (np.cos, np.sin)]
    return np.concatenate(parts, axis=1).reshape(-1)


def normals(stream: np.ndarray, start: int, size: int) -> np.ndarray:
    """`size` (at least 16) standard normal numbers, float32, as `torch.randn` draws them from `start` on."""
    whole = size // BLOCK * BLOCK
    numbers = _box_muller(stream[start : start + whole])
    if size > whole:  # the last block, which overlaps the one before, is drawn again when all others have been
        numbers = np.concatenate([numbers, np.empty(size - whole, np.float32)])
        numbers[-BLOCK:] = _box_muller(stream[start + size : start + size + BLOCK])
    return numbers


def ordered(values: np.ndarray) -> np.ndarray:
    """int64 for float32: neighbouring floats become neighbouring integers."""
    bits = values.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def from_ordered(integers: np.ndarray) -> np.ndarray:
    """The float32 of `ordered`'s integers."""
    bits = np.where(integers < 0, -integers | 0x80000000, integers)
    return bits.astype(np.uint32).view(np.float32)


def drawn(stream: np.ndarray, start: int, shape: list[int], scale: float, shift: float) -> np.ndarray:
    """What is drawn for a weight, before its correction: float32, flat."""
    return normals(stream, start, int(np.prod(shape))) * np.float32(scale) + np.float32(shift)


def _load_weights(file: str, seed: int) -> dict[str, dict[str, np.ndarray]]:
    stream, weights = uniform_stream(seed), {}
    with np.load(FOLDER / file, allow_pickle=False) as stored:
        recipes = json.loads(stored["recipes"].tobytes())
        for task, recipe in recipes.items():
            weights[task] = {name: stored[f"{task}.{name}"] for name in recipe["stored"]}
            corrections, begin = stored[f"{task}.corrections"], 0
            for name, start, shape, scale, shift in recipe["drawn"]:
                values = drawn(stream, start, shape, scale, shift)
                values = from_ordered(ordered(values) + corrections[begin : begin + values.size])
                begin += values.size
                weights[task][name] = values.reshape(shape)
            assert begin == len(corrections), f"{task}: {len(corrections)} corrections for {begin} drawn numbers"
            for name, same in recipe["same"].items():
                weights[task][name] = weights[task][same].copy()
    return weights


def load_weights() -> dict[str, dict[str, np.ndarray]]:
    """Each BLIP task's original state dict."""
    return _load_weights("weights.npz", SEED)


def load_clip_weights() -> dict[str, np.ndarray]:
    """CLIP's original state dict."""
    return _load_weights("clip.weights.npz", CLIP_SEED)["clip"]


def load_cases(start: str = "") -> tuple[dict, dict[str, np.ndarray]]:
    """(what cases.json holds, inputs and outputs by name); `start` is "clip." for CLIP's."""
    with np.load(FOLDER / f"{start}cases.npz", allow_pickle=False) as stored:
        cases = json.loads((FOLDER / f"{start}cases.json").read_text())
        return cases, {name: stored[name] for name in stored.files}
