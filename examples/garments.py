"""Photographs of garments with questions and captions, of the public clothing data set (CC0).

The data set is not part of the project. A folder has it in either layout:

- `train.parquet`, `validation.parquet`, `test.parquet` with the columns `image` (image bytes) and `label` (the name)
- the public repository's, github.com/alexeygrigorev/clothing-dataset-small: `train/`, `validation/`, `test/`, with a
  folder for each class
"""

from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Image, load_dataset


# By the data set's label, the name of the garment as questions and captions have it: one word.
GARMENTS = {
    "dress": "dress",
    "hat": "hat",
    "longsleeve": "longsleeve",
    "outwear": "outwear",
    "pants": "pants",
    "shirt": "shirt",
    "shoes": "shoes",
    "shorts": "shorts",
    "skirt": "skirt",
    "t-shirt": "tshirt",
}
WHAT = ("what garment is this?", "which garment does the photo show?")
IS_IT = ("is this a {}?", "does the photo show a {}?")
CAPTIONS = ("a photo of a {}", "this is a {}", "a picture of a {}", "a {}")
SPLITS = ("train", "validation", "test")


def load_garments(folder, split: str) -> Dataset:
    """Return all photographs of a split with the columns `image` and `label` (the garment's name, one word)."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}.")
    folder = Path(folder)
    if (file := folder / f"{split}.parquet").is_file():
        rows = load_dataset("parquet", data_files=str(file), split="train")
    elif (folder / split).is_dir():
        rows = load_dataset("imagefolder", data_dir=str(folder / split), split="train")
    else:
        raise FileNotFoundError(
            f"{folder} has neither {split}.parquet nor a folder {split}: expected the clothing data set, as parquet"
            " files or as its public repository has it."
        )
    if missing := {"image", "label"} - set(rows.column_names):
        raise ValueError(f"{folder}: the {split} split has no {' and no '.join(sorted(missing))}: expected both.")
    labels = list(rows["label"])
    if isinstance(rows.features["label"], ClassLabel):
        labels = rows.features["label"].int2str(labels)
    rows = rows.cast_column("image", Image())
    if unknown := set(labels) - set(GARMENTS):
        raise ValueError(f"{folder}: unknown labels {sorted(unknown)}: expected {', '.join(GARMENTS)}.")
    return rows.remove_columns("label").add_column("label", [GARMENTS[label] for label in labels])


def ask(label: str, kind: str, rng) -> tuple[str, str]:
    """Return a question about a photograph, "what" or "is it", and its answer; half of the latter are "no"."""
    if kind == "what":
        return str(rng.choice(WHAT)), label
    others = [name for name in GARMENTS.values() if name != label]
    asked = label if rng.random() < 0.5 else str(rng.choice(others))
    return str(rng.choice(IS_IT)).format(asked), "yes" if asked == label else "no"


def load_garment_questions(folder, split: str, num_questions: int | None = None, seed: int = 0) -> Dataset:
    """Return questions about photographs: `image`, `question`, `answer` and `kind`.

    Each photograph has a question "what garment is this?" and one to be answered by yes or no. Without `num_questions`
    there is one of each for every photograph; else
    that many rows, photographs in an order drawn by the seed, over again when all are through.
    """
    photographs = load_garments(folder, split)
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    indices, kinds = _draw(len(photographs), num_questions, rng)
    labels = photographs["label"]
    asked = [ask(labels[index], kind, rng) for index, kind in zip(indices, kinds)]
    rows = photographs.select(indices).remove_columns("label")
    columns = zip(("question", "answer", "kind"), (*zip(*asked), kinds))
    for name, values in columns:
        rows = rows.add_column(name, list(values))
    return rows


def _draw(number: int, num_questions: int | None, rng) -> tuple[list[int], list[str]]:
    """Return the photograph and the kind of each question."""
    if num_questions is None:
        return [index for index in range(number) for _ in range(2)], ["what", "is it"] * number
    rounds = -(-num_questions // number)
    indices = np.concatenate([rng.permutation(number) for _ in range(rounds)])[:num_questions].tolist()
    return indices, ["what" if rng.random() < 0.5 else "is it" for _ in indices]


def load_garment_captions(folder, split: str, num_images: int | None = None, seed: int = 0) -> Dataset:
    """Return photographs with captions, as `load_garment_questions` draws them.

    Columns: `image`, `captions`, `label` and `image_id`. The latter is the label: a caption fits every photograph of a
    garment, so that these must not be negatives of each other in training.
    """
    photographs = load_garments(folder, split)
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    indices = range(len(photographs)) if num_images is None else _draw(len(photographs), num_images, rng)[0]
    rows = photographs.select(indices)
    labels = list(rows["label"])
    rows = rows.add_column("captions", [[caption.format(label) for caption in CAPTIONS] for label in labels])
    return rows.add_column("image_id", labels)
