"""Search images by words or by an image: an index of their embeddings on disk, and queries of it.

An index is a folder of three files. `index.json` says what made it and which two files hold the vectors (FAISS, inner
product) and the images' names (Parquet, a row a vector). It is replaced in one step, last, so the folder holds a whole
index at any time.
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

from .calibration import restored
from .embedding import embed_images, embedding_size, encode_images, encode_texts, load_model, progress, tokenize
from .images import open_image
from .version import __version__


__all__ = ["ImageIndex", "encode_images", "encode_texts", "index_images", "load_index", "load_model", "search"]

KINDS = ("flat", "hnsw", "ivf")
SUFFIXES = tuple(".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .avif .jp2 .heic .heif".split())
_DESCRIPTION = "index.json"
_HINT = "Search again with the index's model, embed all images anew (--force, force=True), or choose another folder."


@dataclass
class ImageIndex:
    """An index of image embeddings.

    vectors (`faiss.Index`): of row i the embedding of the image `names[i]`, a path relative to `info["root"]`. info
    (`dict`): what `index.json` says: `model`, `revision`, `weights` (a fingerprint), `dtype`, `reduction`, ..., and
    `unreadable`, from names to reasons. embedded, kept, removed: how many images the run that made it embedded, took
    over and dropped.
    """

    vectors: object
    names: list[str]
    info: dict
    embedded: int = 0
    kept: int = 0
    removed: int = 0
    _models: dict = field(default_factory=dict, repr=False)  # of the index's own, under None, and of those checked

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
    """Embed images into an index on disk, or update it: only images that are new or have changed, by size and time,
    are embedded.

    Args:
        model, processor:
            As `encode_images` takes them, or `load_model` returns them.
        images (`str`, `Path` or `list`):
            A folder, searched with those in it for files with an image's suffix; a text file with a path a line, from
            its own folder; or a list of paths. Images that can't be read are left out and listed, with the reason, in
            `info["unreadable"]`.
        folder (`str` or `Path`):
            The index's folder: a new or empty one, or an index of the same model.
        kind (`str`, *optional*, defaults to `"flat"`):
            `"flat"` compares a query with every image; of more than a million, `"hnsw"` (a graph) and `"ivf"`
            (clusters) find nearly the same, faster.
        reduction (`float`, *optional*):
            The calibrated share of FLOPs to save; by default the model prunes as it is set. Queries will do the same.
        batch_size, num_workers, show_progress_bar:
            As `encode_images`'.
        force (`bool`, *optional*, defaults to `False`):
            Embed all images anew, whatever the index is of.
        save_interval (`float`, *optional*, defaults to 300):
            Seconds between saves. What was embedded is saved too if the run is interrupted, and the next goes on from
            there.

    Raises:
        ValueError: if there is no image, if the index is of another model or of other images, or the folder holds
        something else.
    """
    _faiss()
    if kind not in KINDS:
        raise ValueError(f"Unknown kind of index {kind!r}: expected {', '.join(KINDS)}.")
    folder = Path(folder).expanduser()
    root, names = _find_images(images)
    table = _Table(root, names, embedding_size(model))
    with restored(model):
        if reduction is not None:
            model.set_pruning(reduction=reduction)
        info = {"root": root, "kind": kind, "reduction": reduction, **_describe(model)}
        old_names = _take_over(table, folder, info, force)
        kept = int(table.done.sum())
        todo = np.flatnonzero(~table.done)
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
    """Load an index that [`index_images`] has written.

    Raises:
        FileNotFoundError: if the folder holds none. ValueError: if it is damaged.
    """
    faiss, folder = _faiss(), Path(folder).expanduser()
    if not (folder / _DESCRIPTION).is_file():
        raise FileNotFoundError(f"{folder} holds no index: expected a folder that `madtp-hf index` has written.")
    import pyarrow.parquet

    try:
        info = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        vectors = faiss.read_index(str(folder / info["files"]["vectors"]))
        names = pyarrow.parquet.read_table(folder / info["files"]["images"], columns=["name"])["name"].to_pylist()
        if len(names) != vectors.ntotal:
            raise ValueError(f"{vectors.ntotal} vectors of {len(names)} images")
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"The index {folder} is damaged ({reason}): make it anew with --force.") from error
    return ImageIndex(vectors, names, info)


def search(
    index, query, top_k: int = 10, rerank: bool | int | None = None, model=None, processor=None
) -> list[dict] | list[list[dict]]:
    """Find the images of an index that are nearest to a query.

    Args:
        index (`ImageIndex`, `str` or `Path`):
            The index or its folder. For several queries load it once: it keeps its model.
        query (`str`, `Path`, `PIL.Image.Image` or `list` of them):
            A text; or an image, as a `Path` or opened. A list is several queries.
        top_k (`int`, *optional*, defaults to 10):
            How many images to find.
        rerank (`bool` or `int`, *optional*):
            Of how many of the nearest images to score the match with the text by BLIP's matching head, and to order
            these by matching logit and similarity, added, as BLIP evaluates retrieval. `True` is `top_k`, `False` or 0
            none. By default `top_k` for a text where the model has such a head.
        model, processor (*optional*):
            The index's model, if it is loaded already; by default `search` loads it.

    Returns:
        A list of `{"path", "score", "similarity", "matching"}`, the best first: the score that they are ordered by,
        the cosine similarity, and the matching logit, `None` where there is none. For a list of queries, a list of
        such lists.

    Raises:
        ValueError: for a model other than the index's, an image that can't be read, an empty query.
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
        model.set_pruning(temperature=index.info["pruning_temperature"], factor=index.info["pruning_threshold_factor"])
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
        if row >= 0  # of clusters that hold too few, the rest is -1
    ]


@torch.inference_mode()
def _reranked(model, processor, text: str, found: list[dict], batch_size: int = 32) -> list[dict]:
    """The same images by matching logit and similarity; those that can't be read any more last."""
    readable, images = [], []
    for one in found:
        try:
            images.append(open_image(one["path"]))
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


def _model_of(index: ImageIndex, model, processor):
    """The index's model and processor, loaded if not given; a `ValueError` for another model."""
    if (model is None) != (processor is None):
        raise ValueError("model and processor go together: expected both, or neither.")
    if id(model) not in index._models:
        given = model
        if given is None:
            info = index.info
            model, processor = load_model(info["model"], info["revision"], info["dtype"])
            model.prepack_for_inference()
        with restored(model):
            # The index says how to prune; whether that can be done alike depends on the weights alone.
            temperature = index.info["pruning_temperature"]
            model.set_pruning(temperature=temperature, factor=index.info["pruning_threshold_factor"])
            _check_same_model(index.info, _describe(model))
        index._models[id(given)] = model, processor  # kept, so that its id is not another's
        index._models[id(model)] = model, processor
    return index._models[id(model)]


# What made an index


def _describe(model) -> dict:
    """What a model's embeddings depend on: its name, Hub revision, weights and pruning."""
    config, host, alignment = model.config, hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        digest = alignment if name.startswith("alignment.") else host
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return {
        "model": config.name_or_path or type(model).__name__,
        "revision": getattr(config, "_commit_hash", None),
        "weights": host.hexdigest(),
        # A dense model's alignment tokens are random, and not looked at while pruning is off.
        "alignment": alignment.hexdigest() if model.is_pruning else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "pruning_temperature": config.pruning_temperature,
        "pruning_threshold_factor": config.pruning_threshold_factor,
    }


def _check_same_model(theirs: dict, ours: dict) -> None:
    """Raise a `ValueError` that names both models, unless embeddings by one compare with those by the other."""

    def shown(info):
        revision = f" at {info['revision'][:8]}" if info["revision"] else ""
        return f"{info['model']}{revision} ({info['dtype']}, weights {info['weights'][:8]})"

    def differ(*names):
        return any(theirs[name] != ours[name] for name in names)

    settings = ("pruning_temperature", "pruning_threshold_factor")
    if differ("weights", "dtype") or (differ("alignment") and not differ(*settings)):
        raise ValueError(f"The index was made by {shown(theirs)}, and this is {shown(ours)}. {_HINT}")
    if differ(*settings):
        pruning = [
            f"temperature {info[settings[0]]:g}" if info.get("reduction") is None else f"reduction {info['reduction']}"
            for info in (theirs, ours)
        ]
        raise ValueError(f"The index was made at {pruning[0]}, and this is {pruning[1]}. {_HINT}")


# Files


def _find_images(images) -> tuple[str, list[str]]:
    """The folder that names start from, and the names, each once."""
    if isinstance(images, (str, os.PathLike)):
        path = Path(images).expanduser()
        if path.is_dir():
            root, names = str(path.resolve()), sorted(_walk(path))
        elif path.is_file():
            try:
                lines = path.read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError:
                raise ValueError(f"{path} is no text: expected a folder, or a text file with a path a line.") from None
            root, names = str(path.resolve().parent), [line.strip() for line in lines if line.strip()]
        else:
            raise FileNotFoundError(f"There is no {path}: expected a folder, or a text file with a path a line.")
    else:
        root, names = os.getcwd(), [os.fspath(image) for image in images]
    if not names:
        raise ValueError(f"{images if len(str(images)) < 200 else 'The list'} holds no image: nothing was written.")
    return root, list(dict.fromkeys(names))


def _walk(folder: Path):
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.relpath(os.path.join(place, name), folder)


class _Table:
    """The images to index: their names, sizes and times, and their embeddings as far as they are done."""

    def __init__(self, root: str, names: list[str], size: int):
        self.root, self.names = root, names
        self.vectors, self.done = np.zeros((len(names), size), np.float32), np.zeros(len(names), bool)
        self.unreadable: dict[str, str] = {}
        self.sizes, self.times = np.zeros(len(names), np.int64), np.zeros(len(names), np.int64)
        for row in range(len(names)):
            try:
                status = os.stat(self.path(row))
            except OSError:  # it is tried to be read later, and the reason kept
                continue
            self.sizes[row], self.times[row] = status.st_size, status.st_mtime_ns

    def path(self, row: int) -> str:
        return os.path.join(self.root, self.names[row])

    def add(self, rows, vectors, unreadable: dict[int, str]) -> None:
        if len(rows):
            self.vectors[rows], self.done[rows] = vectors, True
        self.unreadable.update({self.names[row]: reason for row, reason in unreadable.items()})


def _take_over(table: _Table, folder: Path, info: dict, force: bool) -> list[str]:
    """Copy what the index in `folder`, if there is one, has of images that are as they were; the names that it has."""
    if not (folder / _DESCRIPTION).is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is no index and not empty: choose another name for the index.")
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
            " name for the index, or replace it with --force (force=True)."
        )
    if same:
        if old.info["kind"] == "ivf":
            old.vectors.make_direct_map()
        new_rows, old_rows = map(list, zip(*same))
        table.vectors[new_rows] = old.vectors.reconstruct_n(0, len(old))[old_rows]
        table.done[new_rows] = True
    return old.names


def _write(table: _Table, folder: Path, info: dict) -> ImageIndex:
    """Write what is done as an index, in place of the one that is there."""
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
        for path in folder.glob(pattern):  # of the index before, or of a run that was killed
            if path.name not in files.values():
                path.unlink(missing_ok=True)
    return ImageIndex(vectors, names, info)


def _make_vectors(vectors: np.ndarray, kind: str):
    """vectors (N, E) -> a FAISS index of them by inner product."""
    faiss = _faiss()
    size, metric = vectors.shape[1], faiss.METRIC_INNER_PRODUCT
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(size, 32, metric)
        index.hnsw.efConstruction, index.hnsw.efSearch = 200, 128
    elif kind == "ivf":
        # FAISS wants 39 vectors a cluster to learn it from.
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
