"""Writes the committed golden cases, and with them this folder's files, from the folder with all of them.

    python -m tests.golden.make ../shared/reference

Finds where in the stream each weight was drawn, and checks that all weights and cases come back as they were.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from . import BLOCK, FOLDER, drawn, load_cases, load_weights, normals, ordered, uniform_stream


# One sample, another one where there is room for it, and three samples at once.
CASES = {"vqa": (0, 2, 3), "nlvr2": (0, 3), "captioning": (0, 2, 3), "retrieval": (0, 3)}
LIMIT = 4_000_000  # bytes, all files together
GAIN = 1.3  # a weight matrix has this standard deviation, over the square root of its inputs
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
    options = [round(slope, 3), GAIN / (values.size / len(values)) ** 0.5]
    scale, shift = min(options, key=lambda option: abs(option - slope)), float(round(shift))
    correction = ordered(values.ravel()) - ordered(drawn(stream, place, values.shape, scale, shift))
    assert np.abs(correction).max() < 128, f"drawn at {place}: off by {np.abs(correction).max()} units"
    return float(scale), shift, correction.astype(np.int8)


def encode(stream, weights) -> tuple[dict, dict]:
    """(recipe, arrays) of a task's weights."""
    names = {name for name, values in weights.items() if values.dtype == np.float32 and values.size >= COMPARED}
    recipe = {"drawn": [], "same": {}, "stored": []}
    corrections, place = [], find_first(stream, weights["space_dict"])
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


def main(reference: Path) -> None:
    stream, recipes, arrays = uniform_stream(), {}, {}
    originals = {task: load_file(reference / f"{task}.weights.safetensors") for task in CASES}
    for task, weights in originals.items():
        recipes[task], stored = encode(stream, weights)
        arrays |= {f"{task}.{name}": values for name, values in stored.items()}
        print(f"{task}: {len(recipes[task]['drawn'])} weights drawn, stored as they are: {recipes[task]['stored']}")
    recipes = np.frombuffer(json.dumps(recipes).encode(), np.uint8)
    np.savez_compressed(FOLDER / "weights.npz", recipes=recipes, **arrays)

    kept = [f"{task}.{case}." for task, numbers in CASES.items() for case in numbers]
    cases = json.loads((reference / "cases.json").read_text())
    cases["cases"] = [entry for entry in cases["cases"] if f"{entry['key']}.".startswith(tuple(kept))]
    entries = ",\n".join(json.dumps(entry) for entry in cases.pop("cases"))
    (FOLDER / "cases.json").write_text(f'{json.dumps(cases)[:-1]},\n"cases": [\n{entries}\n]}}\n')
    tensors = load_file(reference / "cases.safetensors")
    tensors = {name: values for name, values in tensors.items() if name.startswith(tuple(kept))}
    np.savez_compressed(FOLDER / "cases.npz", **tensors)

    again = {**load_weights(), "cases": load_cases()[1]}
    for task, expected in {**originals, "cases": tensors}.items():
        assert again[task].keys() == expected.keys()
        for name, values in expected.items():
            assert again[task][name].dtype == values.dtype and np.array_equal(again[task][name], values), name
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir() if path.is_file()}
    print(sizes, sum(sizes.values()))
    assert sum(sizes.values()) <= LIMIT, f"more than {LIMIT} bytes"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
