"""Search images by words or by an image: an on-disk index of image embeddings, and queries of it.

An index is a folder of three files. `index.json` says how the index was made and names the other two: the vectors
(FAISS, inner product) and the images' names (Parquet, one row per vector). `index.json` is replaced last and in one
step, so the folder holds a complete index at any time.
"""

import hashlib
import json
import os
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..budgets.passes import restored
from ..checkpoints.load import Loaded, load
from ..data.sources import open_rows
from ..modeling.images import read_image
from ..modeling.prepared_linear import PRECISIONS
from ..modeling.versions import VERSION as __version__
from .embedding import (
    EMBEDDING_TASKS,
    embed_images,
    embedding_size,
    encode_images,
    encode_texts,
    progress,
    tokenize,
)


__all__ = ["ImageIndex", "encode_images", "encode_texts", "index_images", "load_index", "search"]

KINDS = ("flat", "hnsw", "ivf")
_DESCRIPTION = "index.json"
_HINT = "Search with the index's model, embed all images again with `force=True`, or choose another folder."


@dataclass
class ImageIndex:
    """An index of image embeddings.

    vectors (`faiss.Index`): row i is the embedding of the image `names[i]`, a path relative to `info["root"]`. info
    (`dict`): the content of `index.json`: `model`, `revision`, `weights` (a fingerprint), `dtype`, `reduction`, ...,
    and `unreadable`, from names to reasons. embedded, kept, removed: how many images the run that made the index
    embedded, reused and dropped.
    """

    vectors: object
    names: list[str]
    info: dict
    embedded: int = 0
    kept: int = 0
    removed: int = 0
    _models: dict = field(default_factory=dict, repr=False)  # by id: of models checked; id(None): the index's own

    def __len__(self) -> int:
        return len(self.names)

    def path(self, row: int) -> str:
        return os.path.join(self.info["root"], self.names[row])


def index_images(
    model,
    processor,
    images,
    folder,
    *,
    kind: str = "flat",
    reduction: float | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    force: bool = False,
    show_progress_bar: bool | None = None,
    save_interval: float = 300.0,
) -> ImageIndex:
    """Embed images into an on-disk index, or update an index: embed only images that are new or have changed.

    An image has changed if its size or modification time differs. Images that are gone are dropped from the index.

    Args:
        model, processor:
            As `encode_images` takes them.
        images (`str`, `Path` or `list`):
            A folder, searched recursively for files with an image suffix; a text file with one path per line, or a
            table, with paths relative to its folder and inside it; or a list of paths. Images that can't be read are
            left out and listed, with the reason, in `info["unreadable"]`.
        folder (`str` or `Path`):
            The index's folder: a new or empty one, or an index of the same model.
        kind (`str`, *optional*, defaults to `"flat"`):
            `"flat"` compares a query with every image. For more than a million images, `"hnsw"` (a graph) and `"ivf"`
            (clusters) are faster and find nearly the same images.
        reduction (`float`, *optional*):
            The calibrated share of FLOPs to save; by default the model's current pruning applies. Queries prune alike.
        batch_size, num_workers, show_progress_bar:
            As for `encode_images`.
        force (`bool`, *optional*, defaults to `False`):
            Embed all images again, whatever the folder's index holds.
        save_interval (`float`, *optional*, defaults to 300):
            Seconds between saves. An interrupted run also saves what it has embedded, and the next run continues from
            there.

    Returns:
        `ImageIndex`: the index, as written.

    Raises:
        ValueError: if there is no image, if the index is of another model or of other images, or if the folder holds
            something else.
    """
    _faiss()
    if kind not in KINDS:
        raise ValueError(f"Unknown kind of index {kind!r}: expected {', '.join(KINDS)}.")
    folder = Path(folder).expanduser()
    root, names, unreadable = _find_images(images)
    table = _Table(root, names, embedding_size(model))
    table.unreadable.update(unreadable)
    with restored(model):
        if reduction is not None:
            model.set_pruning(reduction=reduction)
        info = {"root": root, "kind": kind, "reduction": reduction, **_describe(model)}
        old_names = _take_over(table, folder, info, force)
        kept = int(table.done.sum())
        todo = np.array([row for row in np.flatnonzero(~table.done) if names[row] not in unreadable], int)
        batches = embed_images(model, processor, [table.path(row) for row in todo], batch_size, num_workers)
        saved = time.monotonic()
        try:
            with progress(len(todo), "image", show_progress_bar) as bar:
                for positions, features, failed in batches:
                    table.add(todo[positions], features, {todo[position]: why for position, why in failed.items()})
                    bar.update(len(positions) + len(failed))
                    if time.monotonic() - saved > save_interval:
                        _write(table, folder, {**info, "kind": "flat"})
                        saved = time.monotonic()
        except BaseException:
            if table.done.sum() > kept:
                _write(table, folder, {**info, "kind": "flat"})
            raise
    if not table.done.any():
        reason = next(iter(table.unreadable.values()))
        raise ValueError(f"None of the {len(names)} images can be read ({reason}): nothing was written.")
    index = _write(table, folder, info)
    index.kept, index.embedded = kept, len(index) - kept
    index.removed = len(set(old_names) - set(index.names))
    return index


def load_index(folder) -> ImageIndex:
    """Load an index that `index_images` has written.

    Raises:
        FileNotFoundError: if the folder holds no index.
        ValueError: if the index is damaged.
    """
    faiss, folder = _faiss(), Path(folder).expanduser()
    if not (folder / _DESCRIPTION).is_file():
        raise FileNotFoundError(f"{folder} is not an index: expected a folder that `madtp-hf index` has written.")
    import pyarrow.parquet

    try:
        info = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        vectors = faiss.read_index(str(folder / info["files"]["vectors"]))
        names = pyarrow.parquet.read_table(folder / info["files"]["images"], columns=["name"])["name"].to_pylist()
        if len(names) != vectors.ntotal:
            raise ValueError(f"{vectors.ntotal} vectors of {len(names)} images")
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"The index {folder} is damaged ({reason}): rebuild it with `force=True`.") from error
    return ImageIndex(vectors, names, info)


def search(
    index, query, top_k: int = 10, rerank: bool | int | None = None, model=None, processor=None
) -> list[dict] | list[list[dict]]:
    """Find the images of an index that are nearest to a query.

    Args:
        index (`ImageIndex`, `str` or `Path`):
            The index or its folder. For several queries, load it once: it keeps its model loaded.
        query (`str`, `Path`, `PIL.Image.Image` or `list` of them):
            A text, or an image as a `Path` or a PIL image. A list holds several queries.
        top_k (`int`, *optional*, defaults to 10):
            How many images to find.
        rerank (`bool` or `int`, *optional*):
            How many of the nearest images to re-rank with BLIP's matching head, by matching logit plus similarity, as
            BLIP evaluates retrieval. `True` means `top_k`; `False` or 0 means none. By default `top_k` for a text
            query if the model has a matching head, else none.
        model, processor (*optional*):
            The index's model and processor, if they are loaded already; by default `search` loads them.

    Returns:
        A list of `{"path", "score", "similarity", "matching"}`, best first: the score that orders them, the cosine
        similarity, and the matching logit or `None`. A list of queries gives a list of such lists.

    Raises:
        ValueError: for a model other than the index's, an image that can't be read, or an empty query.
    """
    if not isinstance(index, ImageIndex):
        index = load_index(index)
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: expected at least 1.")
    model, processor = _model_of(index, model, processor)
    if isinstance(query, list):
        return [search(index, one, top_k, rerank, model, processor) for one in query]
    is_text = isinstance(query, str)
    if is_text and not query.strip():
        raise ValueError("The query is empty: expected words, or an image.")
    has_head = hasattr(model, "itm_head")
    if rerank and not (is_text and has_head):
        what = "an image as query" if not is_text else f"a {type(model).__name__}, which has no matching head"
        raise ValueError(f"rerank={rerank} with {what}: expected a text and BLIP for image-text retrieval.")
    if rerank is None:
        rerank = is_text and has_head
    depth = min(top_k if rerank is True else int(rerank), len(index))
    with restored(model):
        model.config.pruning_setting = index.info["pruning_setting"]
        encode = encode_texts if is_text else encode_images
        embedding = encode(model, processor, query)
        found = _nearest(index, embedding, max(top_k, depth))
        if depth:
            found[:depth] = _reranked(model, processor, query, found[:depth])
    return found[:top_k]


def _nearest(index: ImageIndex, embedding: np.ndarray, count: int) -> list[dict]:
    similarities, rows = index.vectors.search(embedding[None], min(count, len(index)))
    return [
        {"path": index.path(row), "score": similarity, "similarity": similarity, "matching": None}
        for similarity, row in zip(similarities[0].tolist(), rows[0].tolist())
        if row >= 0  # FAISS fills up with -1 if the probed clusters hold too few vectors
    ]


@torch.inference_mode()
def _reranked(model, processor, text: str, found: list[dict], batch_size: int = 32) -> list[dict]:
    """Order images by matching logit plus similarity; images that can no longer be read come last."""
    readable, images = [], []
    for one in found:
        try:
            images.append(read_image(one["path"]))
            readable.append(one)
        except ValueError:
            continue
    encoded = tokenize(model, processor, [text])
    scored = []
    for start in range(0, len(images), batch_size):
        some = images[start : start + batch_size]
        pixels = processor.image_processor(images=some, input_data_format="channels_last", return_tensors="pt")
        pixels = pixels.pixel_values.to(model.device, model.dtype)
        logits = model(**encoded, pixel_values=pixels).itm_score[:, 1].float().tolist()
        for one, logit in zip(readable[start:], logits):
            scored.append({**one, "matching": logit, "score": logit + one["similarity"]})
    return sorted(scored, key=lambda one: -one["score"]) + [one for one in found if one not in readable]


def load_of_index(info: dict, source=None, device=None) -> Loaded:
    """Load the model that an index was made by, prepared for inference, from where it is now if it has moved.

    info: the index's; source: a folder or Hub id, by default the index's own.
    """
    revision = info["revision"] if source in (None, info["model"]) else None
    try:
        return load(
            source or info["model"],
            EMBEDDING_TASKS,
            revision=revision,
            dtype=info["dtype"],
            device=device,
            precision=info["precision"] if info["precision"] in PRECISIONS else "auto",
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{error} The index was made by {info['model']}.") from error


def _model_of(index: ImageIndex, model, processor):
    """Return the index's model and processor, loaded if not given; raise a `ValueError` for another model."""
    if (model is None) != (processor is None):
        raise ValueError("model and processor go together: expected both, or neither.")
    if id(model) not in index._models:
        given = model
        if given is None:
            info = index.info
            loaded = load_of_index(info)
            model, processor = loaded.model, loaded.processor
        with restored(model):
            # Pruning is set as in the index, so that only a difference of weights or dtype is an error.
            model.config.pruning_setting = index.info["pruning_setting"]
            _check_same_model(index.info, _describe(model))
        index._models[id(given)] = model, processor  # kept alive, so that its id isn't reused
        index._models[id(model)] = model, processor
    return index._models[id(model)]


# What an index depends on


def _describe(model) -> dict:
    """Describe what a model's embeddings depend on: its name, Hub revision, weights and pruning."""
    config, host, alignment = model.config, hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        digest = alignment if name.startswith("alignment.") else host
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    dtype = str(model.dtype).removeprefix("torch.")
    return {
        "model": config.name_or_path or type(model).__name__,
        "revision": getattr(config, "_commit_hash", None),
        "weights": host.hexdigest(),
        # With pruning off, alignment tokens have no effect, and those of a dense model are random.
        "alignment": alignment.hexdigest() if model.is_pruning else None,
        "dtype": dtype,
        "precision": model.inference_precision or dtype,
        "pruning_method": config.pruning_method,
        "pruning_setting": config.pruning_setting,
    }


def _check_same_model(theirs: dict, ours: dict) -> None:
    """Raise a `ValueError` that names both models, unless their embeddings can be compared."""

    def shown(info):
        revision = f" at {info['revision'][:8]}" if info["revision"] else ""
        return f"{info['model']}{revision} ({info['dtype']}, {info['precision']}, weights {info['weights'][:8]})"

    def differ(*names):
        return any(theirs[name] != ours[name] for name in names)

    settings = ("pruning_method", "pruning_setting")
    if differ("weights", "dtype", "precision") or (differ("alignment") and not differ(*settings)):
        raise ValueError(f"The index was made by {shown(theirs)}, and this is {shown(ours)}. {_HINT}")
    if differ(*settings):

        def pruning(info):
            if info.get("reduction") is not None:
                return f"pruning to reduction {info['reduction']}"
            setting = info["pruning_setting"]
            return "pruning off" if setting is None else f"{info['pruning_method']} pruning, {setting}"

        raise ValueError(f"The index was made with {pruning(theirs)}, and this is {pruning(ours)}. {_HINT}")


# Files


def _find_images(images) -> tuple[str, list[str], dict[str, str]]:
    """Return the root folder, the images' names without duplicates, and the names that can't be read, with reasons."""
    rows = open_rows(images, wanted=("image",))
    if not rows.in_memory:
        raise ValueError(f"{rows.name} holds images in its rows: expected a folder of image files, or a list of them.")
    found = {row.key: row for row in rows.rows(0, len(rows))}
    return rows.folder, list(found), {name: row.error for name, row in found.items() if row.error}


class _Table:
    """The images to index: their names, sizes and modification times, and the embeddings computed so far."""

    def __init__(self, root: str, names: list[str], size: int):
        self.root, self.names = root, names
        self.vectors, self.done = np.zeros((len(names), size), np.float32), np.zeros(len(names), bool)
        self.unreadable: dict[str, str] = {}
        self.sizes, self.times = np.zeros(len(names), np.int64), np.zeros(len(names), np.int64)
        for row in range(len(names)):
            try:
                status = os.stat(self.path(row))
            except OSError:  # reading it later gives the reason
                continue
            self.sizes[row], self.times[row] = status.st_size, status.st_mtime_ns

    def path(self, row: int) -> str:
        return os.path.join(self.root, self.names[row])

    def add(self, rows, vectors, unreadable: dict[int, str]) -> None:
        if len(rows):
            self.vectors[rows], self.done[rows] = vectors, True
        self.unreadable.update({self.names[row]: reason for row, reason in unreadable.items()})


def _take_over(table: _Table, folder: Path, info: dict, force: bool) -> list[str]:
    """Copy the embeddings of unchanged images from the index in `folder`, if any; return the names in that index."""
    if not (folder / _DESCRIPTION).is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is not empty and not an index: choose another folder.")
        return []
    if force:
        return []
    import pyarrow.parquet

    old = load_index(folder)
    _check_same_model(old.info, info)
    stored = pyarrow.parquet.read_table(folder / old.info["files"]["images"]).to_pydict()
    known = {
        name: (row, size, changed)
        for row, (name, size, changed) in enumerate(zip(stored["name"], stored["size"], stored["mtime_ns"]))
    }
    same = [
        (row, known[name][0])
        for row, name in enumerate(table.names)
        if name in known and known[name][1:] == (table.sizes[row], table.times[row])
    ]
    if not same and old.info["root"] != table.root:
        raise ValueError(
            f"{folder} is an index of {old.info['root']}, and none of its images is in {table.root}: choose another"
            " folder, or replace it with `force=True`."
        )
    if same:
        if old.info["kind"] == "ivf":
            old.vectors.make_direct_map()
        new_rows, old_rows = map(list, zip(*same))
        table.vectors[new_rows] = old.vectors.reconstruct_n(0, len(old))[old_rows]
        table.done[new_rows] = True
    return old.names


def _write(table: _Table, folder: Path, info: dict) -> ImageIndex:
    """Write the embeddings computed so far as an index that replaces the one in `folder`."""
    import pyarrow
    import pyarrow.parquet

    rows = np.flatnonzero(table.done)
    names = [table.names[row] for row in rows]
    vectors = _make_vectors(table.vectors[rows], info["kind"])
    mark = uuid.uuid4().hex[:8]
    files = {"vectors": f"vectors-{mark}.faiss", "images": f"images-{mark}.parquet"}
    info = {**info, "images": len(names), "unreadable": table.unreadable, "files": files, "version": __version__}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _faiss().write_index(vectors, str(folder / files["vectors"]))
        columns = {"name": names, "size": table.sizes[rows], "mtime_ns": table.times[rows]}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / files["images"])
        description = folder / f"{_DESCRIPTION}.{mark}"
        description.write_text(json.dumps(info, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(description, folder / _DESCRIPTION)
    except BaseException:
        for path in folder.glob(f"*{mark}*"):
            path.unlink()
        raise
    for pattern in ("vectors-*.faiss", "images-*.parquet"):
        for path in folder.glob(pattern):  # left by the previous index or a killed run
            if path.name not in files.values():
                path.unlink(missing_ok=True)
    return ImageIndex(vectors, names, info)


def _make_vectors(vectors: np.ndarray, kind: str):
    """Build a FAISS index of vectors (N, E) by inner product."""
    faiss = _faiss()
    size, metric = vectors.shape[1], faiss.METRIC_INNER_PRODUCT
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(size, 32, metric)
        index.hnsw.efConstruction, index.hnsw.efSearch = 200, 128
    elif kind == "ivf":
        # FAISS asks for at least 39 training vectors per cluster.
        clusters = max(1, min(int(4 * len(vectors) ** 0.5), len(vectors) // 39))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(size), size, clusters, metric)
        index.nprobe = max(8, clusters // 16)
        index.train(vectors)
    else:
        index = faiss.IndexFlatIP(size)
    index.add(vectors)
    return index


def _faiss():
    try:
        import faiss
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ImportError(f"Image search needs {error.name}: pip install 'madtp_hf[search]'.") from error
    return faiss
