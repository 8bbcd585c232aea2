"""Search images by words or by an image: an on-disk index of image embeddings, and queries of it.

An index is a folder. `index.json` says how the index was made and names two other files: the vectors (FAISS, inner
product) and the images' names (Parquet, one row per vector). `index.json` is replaced last and in one step, so the
folder holds a complete index at any time. `job` holds the embeddings (`jobs.state`), from which the index is built.
"""

import json
import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..budgets.evaluation import prepared
from ..budgets.passes import restored
from ..checkpoints.load import Loaded, load
from ..data.sources import open_rows
from ..jobs.outputs import FileOutput
from ..jobs.reading import Reader, prepare
from ..jobs.run import run_job
from ..jobs.state import State, sync, write_atomically
from ..jobs.workers import ImageEmbedder, Matcher, describe_model
from ..modeling.images import read_image
from ..modeling.prepared_linear import PRECISIONS
from ..modeling.versions import VERSION as __version__
from .embedding import encode_images, encode_texts


KINDS = ("flat", "hnsw", "ivf")
_DESCRIPTION = "index.json"
_HINT = "Search with the index's model, embed all images again with `force=True`, or choose another folder."


@dataclass
class ImageIndex:
    """An index of image embeddings.

    vectors (`faiss.Index`): row i is the embedding of the image `names[i]`, a path relative to `info["root"]`. info
    (`dict`): the content of `index.json`: `model`, `revision`, `weights` (a fingerprint), `dtype`, `pruning`, ...,
    and `unreadable`, from names to reasons. embedded, kept, removed: how many images the run that made the index
    embedded, reused and dropped.
    """

    vectors: Any
    names: list[str]
    info: dict
    embedded: int = 0
    kept: int = 0
    removed: int = 0
    _models: dict = field(default_factory=dict, repr=False)  # by id: of models checked; id(None): the index's own

    def __len__(self) -> int:
        return len(self.names)

    def path(self, row: int) -> str:
        return os.path.join(self.info["root"] or "", self.names[row])


class IndexOutput(FileOutput):
    """The index of a job's embeddings: `made`, once it is written."""

    made: ImageIndex

    def __init__(self, folder, kind: str, info: dict):
        if kind not in KINDS:
            raise ValueError(f"Unknown kind of index {kind!r}: expected {', '.join(KINDS)}.")
        self.out = Path(folder).expanduser()
        self.folder, self.kind, self.info = self.out / "job", kind, info

    def check(self, manifest: dict | None) -> None:
        if manifest is None and not (self.out / _DESCRIPTION).is_file() and self.out.exists():
            if not self.out.is_dir() or any(one.name != "job" for one in self.out.iterdir()):
                raise ValueError(f"{self.out} is not empty and not an index: choose another folder.")

    def write(self, state: State, tables, errors) -> None:
        """Write the embeddings as an index that replaces the one in the folder."""
        names, vectors = [], []
        for keys, table in tables:
            names += keys
            vectors.append(_vectors(table["embedding"]))
        unreadable = {row["key"]: row["error"] for row in errors}
        if not names:
            reason = next(iter(unreadable.values()))
            raise ValueError(f"None of the {len(unreadable)} images can be read ({reason}): no index was written.")
        once = {name: row for row, name in enumerate(names)}  # a list may name an image twice
        self.build([*once], np.concatenate(vectors)[[*once.values()]], unreadable)

    def build(self, names: list[str], vectors: np.ndarray, unreadable: dict[str, str]) -> None:
        import pyarrow
        import pyarrow.parquet

        index, mark = _make_vectors(vectors, self.kind), uuid.uuid4().hex[:8]
        files = {"vectors": f"vectors-{mark}.faiss", "images": f"images-{mark}.parquet"}
        info = {**self.info, "kind": self.kind, "images": len(names), "unreadable": unreadable, "files": files}
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            _faiss().write_index(index, str(self.out / files["vectors"]))
            # As bytes, since names of files need not be UTF-8.
            columns = {"name": pyarrow.array([os.fsencode(name) for name in names], pyarrow.binary())}
            pyarrow.parquet.write_table(pyarrow.table(columns), self.out / files["images"])
            for name in files.values():
                sync(self.out / name)
            write_atomically(self.out / _DESCRIPTION, json.dumps(info, indent=1).encode())
        except BaseException:
            for name in files.values():
                (self.out / name).unlink(missing_ok=True)
            raise
        for pattern in ("vectors-*.faiss", "images-*.parquet"):
            for path in self.out.glob(pattern):  # left by the previous index or a killed run
                if path.name not in files.values():
                    path.unlink(missing_ok=True)
        self.made = ImageIndex(index, names, info)


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
) -> ImageIndex:
    """Embed images into an on-disk index, or update an index: embed only images that are new or have changed.

    An image has changed if its size or modification time differs. Images that are gone are dropped from the index.

    Args:
        model, processor:
            As `encode_images` takes them.
        images (`str`, `Path` or `list`):
            Images, as `open_rows` takes them: a folder, a list or table of paths, tars, ...; or a Parquet file of
            embeddings that `madtp-hf embed` has written with this model. Images that can't be read are left out and
            listed, with the reason, in `info["unreadable"]`.
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

    Returns:
        `ImageIndex`: the index, as written.

    Raises:
        ValueError: if there is no image, if the index is of another model or of other images, or if the folder holds
            something else.
    """
    with restored(model), prepared(model):
        worker = ImageEmbedder(model, processor, reduction)
        options = {"batch_size": batch_size, "num_workers": num_workers, "force": force}
        return build_index(worker, images, folder, kind, show_progress=show_progress_bar, **options)


def build_index(worker: ImageEmbedder, images, folder, kind: str = "flat", *, image_dir=None, **options):
    """Build or update an index with a worker; see `index_images`. options: of `run_job`.

    Returns: `ImageIndex` in the first process of several, None in others.
    """
    _faiss()
    config = worker.model.config
    info = {
        "model": config.name_or_path or type(worker.model).__name__,
        "revision": getattr(config, "_commit_hash", None),
        "reduction": worker.reduction,
        "pruning": worker.pruning_note(),
        **describe_model(worker.model),
        "version": __version__,
    }
    output, embedded = IndexOutput(folder, kind, info), 0
    try:
        before = load_index(output.out).names
    except (OSError, ValueError):
        before = []
    made_of = _read_embeddings(images, worker)
    if made_of is not None:
        info["root"], names, vectors = made_of
        force = options.get("force", False)
        state = State(output.folder, output.out, worker.column, worker.value_type())
        output.check(None if force else state.read_manifest())
        settings = {**worker.settings(), "embeddings": True}
        state.begin(settings, os.path.abspath(images), {"model": info["model"]}, force)
        output.build(names, vectors, {})
        state.write_manifest()
        state.release()
    else:
        source = open_rows(images, image_dir=image_dir, wanted=worker.wanted())
        info["root"] = source.folder if source.in_memory else None
        summary = run_job(Reader(source, worker.processor.image_processor), worker, output, **options)
        if summary is None:
            return None
        embedded = summary.done_now - summary.failed_now
    index = output.made
    index.embedded, index.kept, index.removed = embedded, len(index) - embedded, len({*before} - {*index.names})
    return index


def _read_embeddings(images, worker: ImageEmbedder) -> tuple[str | None, list[str], np.ndarray] | None:
    """Return the image folder, names and vectors of a file that a job has written; None for anything else.

    Raises: `ValueError` if another model has made them.
    """
    if isinstance(images, (list, tuple)) or Path(images).suffix != ".parquet" or not os.path.isfile(images):
        return None
    import pyarrow.parquet

    noted = (pyarrow.parquet.read_schema(images).metadata or {}).get(b"madtp_hf")
    if noted is None:
        return None
    noted = json.loads(noted)
    _check_same_model({**noted["settings"], "model": noted["model"]}, _described(worker.model))
    if "image_processor" not in noted["settings"] or noted["settings"]["output"] != worker.column:
        raise ValueError(
            f"{images} holds no embeddings of images: expected a file that `madtp-hf embed` wrote for images."
        )
    table = pyarrow.parquet.read_table(images, columns=["key", worker.column])
    return noted["folder"], table["key"].to_pylist(), _vectors(table[worker.column])


def _vectors(column) -> np.ndarray:
    """Return an Arrow column of lists of one length as (N, E)."""
    size = column.type.list_size
    return np.concatenate(
        [np.empty((0, size), np.float32)] + [c.flatten().to_numpy().reshape(-1, size) for c in column.chunks]
    )


def load_index(folder) -> ImageIndex:
    """Load an index that `index_images` has written.

    Raises:
        FileNotFoundError: if the folder holds no index.
        ValueError: if the index is damaged.
    """
    faiss, folder = _faiss(), Path(folder).expanduser()
    if not (folder / _DESCRIPTION).is_file():
        raise FileNotFoundError(f"{folder} is not an index: expected a folder that `madtp-hf index` wrote.")
    import pyarrow.parquet

    text = None
    while True:
        try:
            before, text = text, (folder / _DESCRIPTION).read_text(encoding="utf-8")
            info = json.loads(text)
            vectors = faiss.read_index(str(folder / info["files"]["vectors"]))
            names = pyarrow.parquet.read_table(folder / info["files"]["images"], columns=["name"])["name"].to_pylist()
            if len(names) != vectors.ntotal:
                raise ValueError(f"{vectors.ntotal} vectors of {len(names)} images")
            return ImageIndex(vectors, [os.fsdecode(name) for name in names], info)
        except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
            if text == before:  # else it has just been replaced: read it again
                reason = str(error).strip().partition("\n")[0]
                raise ValueError(f"The index {folder} is damaged ({reason}): rebuild it with `force=True`.") from error


def search(index, query, top_k: int = 10, rerank: bool | int | None = None, model=None, processor=None) -> list[Any]:
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
        A list of `{"path", "similarity", "matching", "score"}`, best first: the cosine similarity; the matching logit,
        and the sum of both, which orders the images that were re-ranked, before all others. For these both are `None`.
        A list of queries gives a list of such lists.

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
    with restored(model), _pruning_of(index, model):
        # A query that is too long is an error.
        embedding = (
            encode_texts(model, processor, query, truncation=None)
            if is_text
            else encode_images(model, processor, query)
        )
        found = _nearest(index, embedding, max(top_k, depth))
        if depth:
            found[:depth] = _reranked(Matcher(model, processor), query, found[:depth])
    return found[:top_k]


def _pruning_of(index: ImageIndex, model):
    """Prune as the index's images were, within a `with` block."""
    setting = index.info["pruning_setting"]
    return model.pruning(None) if setting is None else model.pruning(**setting)


def _nearest(index: ImageIndex, embedding: np.ndarray, count: int) -> list[dict]:
    similarities, rows = index.vectors.search(embedding[None], min(count, len(index)))
    return [
        {"path": index.path(row), "similarity": similarity, "matching": None, "score": None}
        for similarity, row in zip(similarities[0].tolist(), rows[0].tolist())
        if row >= 0  # FAISS fills up with -1 if the probed clusters hold too few vectors
    ]


@torch.no_grad()
def _reranked(matcher: Matcher, text: str, found: list[dict], batch_size: int = 32) -> list[dict]:
    """Order images by matching logit plus similarity; images that can no longer be read come last."""
    readable, pixels = [], []
    for one in found:
        try:
            pixels.append(prepare(read_image(one["path"]), matcher.processor.image_processor))
            readable.append(one)
        except ValueError:
            continue
    scored = []
    for start in range(0, len(readable), batch_size):
        logits = matcher.logits(np.stack(pixels[start : start + batch_size]), [text])[:, 1].tolist()
        for one, logit in zip(readable[start:], logits):
            scored.append({**one, "matching": logit, "score": logit + one["similarity"]})
    return sorted(scored, key=lambda one: -one["score"]) + [one for one in found if one not in readable]


# The index's model


def load_of_index(info: dict, source=None, device=None) -> Loaded:
    """Load the model that an index was made by, prepared for inference, from where it is now if it has moved.

    info: the index's; source: a folder or Hub id, by default the index's own.
    """
    revision = info["revision"] if source in (None, info["model"]) else None
    precision = info["precision"] if info["precision"] in PRECISIONS else "auto"
    options = {"revision": revision, "dtype": info["dtype"], "device": device, "precision": precision}
    try:
        return load(source or info["model"], ImageEmbedder.tasks, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{error} The index was made by {info['model']}.") from error


def _model_of(index: ImageIndex, model, processor):
    """Return the index's model and processor, loaded if not given; raise a `ValueError` for another model."""
    if (model is None) != (processor is None):
        raise ValueError("model and processor go together: expected both, or neither.")
    if id(model) not in index._models:
        given = model
        if given is None:
            loaded = load_of_index(index.info)
            model, processor = loaded.model, loaded.processor
        with _pruning_of(index, model):
            # Pruning is set as in the index, so that only a difference of weights or dtype is an error.
            _check_same_model(index.info, _described(model))
        index._models[id(given)] = model, processor  # kept alive, so that its id isn't reused
        index._models[id(model)] = model, processor
    return index._models[id(model)]


def _described(model) -> dict:
    return {**describe_model(model), "model": model.config.name_or_path or type(model).__name__}


def _check_same_model(theirs: dict, ours: dict) -> None:
    """Raise a `ValueError` that names both models, unless their embeddings can be compared."""
    names = [name for name in ours if name != "model" and theirs.get(name) != json.loads(json.dumps(ours[name]))]
    if names:
        changes = "; ".join(f"{name} {theirs.get(name)!r}, here {ours[name]!r}" for name in names)
        raise ValueError(f"The index was made by {theirs['model']}, and this is {ours['model']} ({changes}). {_HINT}")


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
