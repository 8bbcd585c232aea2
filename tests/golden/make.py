"""Writes the committed golden cases, and with them this folder's files, from the folder with all of them.

    python -m tests.golden.make ../shared/reference

Finds where in the stream each weight was drawn, and checks that all weights and cases come back as they were.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from . import (
    BLOCK,
    CLIP_SEED,
    FOLDER,
    drawn,
    load_cases,
    load_clip_weights,
    load_weights,
    normals,
    ordered,
    uniform_stream,
)


# One sample, another one where there is room for it, and three samples at once.
CASES = {"vqa": (0, 2, 3), "nlvr2": (0, 3), "captioning": (0, 2, 3), "retrieval": (0, 3)}
CLIP_CASES = {"clip": (1, 3)}
CLIP_START = 11_328  # where in its stream the first of CLIP's weights was drawn
LIMIT, CLIP_LIMIT = 4_000_000, 1_000_000  # bytes, all files of a family together
GAINS = (1.3, 1.2, 1.0)  # a weight matrix has one of these standard deviations, over the square root of its inputs
COMPARED = 48  # numbers that show whether a weight was drawn at a place
FARTHEST = 256  # draws between two weights of a model: what small tensors take


def find(stream, weights, names, start):
    """(name, place) of the next weight drawn at `start` or shortly behind; None if there is none."""
    for place in range(start, start + FARTHEST):
        expected = normals(stream, place, COMPARED)
        for name in names:
            values = weights[name].ravel()[:COMPARED]
            if values.size == COMPARED and np.corrcoef(values, expected)[0, 1] > 0.9999:
                return name, place
    return None


def find_first(stream, values) -> int:
    """Where a standard normal weight was drawn, anywhere in the stream."""
    first, second = values.ravel()[:BLOCK].astype(np.float64).reshape(2, -1)
    radii = 1 - np.exp(-(first**2 + second**2) / 2)
    angles = np.arctan2(second, first) / (2 * np.pi) % 1
    pattern = np.concatenate([radii, angles])
    places = np.flatnonzero(np.abs(stream[: -BLOCK + 1] - pattern[0]) < 1e-5)
    for index in range(1, BLOCK):
        places = places[np.abs(stream[places + index] - pattern[index]) < 1e-4]
    (place,) = places
    return int(place)


def fit(stream, place, values):
    """(scale, shift, correction) of a weight drawn at a place."""
    numbers = normals(stream, place, values.size).astype(np.float64)
    slope, shift = np.polyfit(numbers, values.ravel().astype(np.float64), 1)
    inputs = (values.size / len(values), len(values))
    options = [round(slope, 3), *(gain / number**0.5 for gain in GAINS for number in inputs)]
    scale, shift = min(options, key=lambda option: abs(option - slope)), float(round(shift))
    correction = ordered(values.ravel()) - ordered(drawn(stream, place, values.shape, scale, shift))
    assert np.abs(correction).max() < 128, f"drawn at {place}: off by {np.abs(correction).max()} units"
    return float(scale), shift, correction.astype(np.int8)


def encode(stream, weights, start: int | None = None) -> tuple[dict, dict]:
    """(recipe, arrays) of a task's weights; start: where the first was drawn, that of the alignment tokens if not
    given."""
    names = {name for name, values in weights.items() if values.dtype == np.float32 and values.size >= COMPARED}
    names -= {name for name in names if np.ptp(weights[name]) == 0}  # ones, of norms
    recipe = {"drawn": [], "same": {}, "stored": []}
    corrections, place = [], find_first(stream, weights["space_dict"]) if start is None else start
    while found := find(stream, weights, sorted(names), place):
        name, place = found
        values = weights[name]
        scale, shift, correction = fit(stream, place, values)
        recipe["drawn"].append([name, place, list(values.shape), scale, shift])
        corrections.append(correction)
        for other in sorted(names - {name}):
            if np.array_equal(weights[other], values):
                recipe["same"][other] = name
        names -= {name, *recipe["same"]}
        place += values.size + (BLOCK if values.size % BLOCK else 0)
    recipe["stored"] = sorted(set(weights) - {entry[0] for entry in recipe["drawn"]} - set(recipe["same"]))
    return recipe, {"corrections": np.concatenate(corrections), **{name: weights[name] for name in recipe["stored"]}}


def write_weights(reference: Path, tasks, file: str, stream, start: int | None = None) -> dict:
    """Write what draws the tasks' weights again; returns the weights."""
    recipes, arrays = {}, {}
    originals = {task: load_file(reference / f"{task}.weights.safetensors") for task in tasks}
    for task, weights in originals.items():
        recipes[task], stored = encode(stream, weights, start)
        arrays |= {f"{task}.{name}": values for name, values in stored.items()}
        print(f"{task}: {len(recipes[task]['drawn'])} weights drawn, stored as they are: {recipes[task]['stored']}")
    recipes = np.frombuffer(json.dumps(recipes).encode(), np.uint8)
    np.savez_compressed(FOLDER / file, recipes=recipes, **arrays)
    return originals


def write_cases(reference: Path, start: str, numbers_of_tasks: dict) -> dict:
    """Write some of the cases; returns their tensors."""
    kept = tuple(f"{task}.{case}." for task, numbers in numbers_of_tasks.items() for case in numbers)
    cases = json.loads((reference / f"{start}cases.json").read_text())
    cases["cases"] = [entry for entry in cases["cases"] if f"{entry['key']}.".startswith(kept)]
    entries = ",\n".join(json.dumps(entry) for entry in cases.pop("cases"))
    (FOLDER / f"{start}cases.json").write_text(f'{json.dumps(cases)[:-1]},\n"cases": [\n{entries}\n]}}\n')
    tensors = load_file(reference / f"{start}cases.safetensors")
    tensors = {name: values for name, values in tensors.items() if name.startswith(kept)}
    np.savez_compressed(FOLDER / f"{start}cases.npz", **tensors)
    return tensors


def check(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype and np.array_equal(found[name], values), name


def main(reference: Path) -> None:
    originals = write_weights(reference, CASES, "weights.npz", uniform_stream())
    tensors = write_cases(reference, "", CASES)
    for task, weights in load_weights().items():
        check(weights, originals[task])
    check(load_cases()[1], tensors)

    originals = write_weights(reference, CLIP_CASES, "clip.weights.npz", uniform_stream(CLIP_SEED), CLIP_START)
    tensors = write_cases(reference, "clip.", CLIP_CASES)
    check(load_clip_weights(), originals["clip"])
    check(load_cases("clip.")[1], tensors)

    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir() if path.is_file()}
    of_clip = sum(size for name, size in sizes.items() if name.startswith("clip."))
    print(sizes, of_clip)
    assert of_clip <= CLIP_LIMIT, f"CLIP's are more than {CLIP_LIMIT} bytes"
    assert sum(sizes.values()) - of_clip <= LIMIT, f"BLIP's are more than {LIMIT} bytes"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
