"""Measure image search on digit scenes: the time of a query after loading, and the agreement with brute force.

The script writes scenes of the test split as PNG files, embeds them into an index with the shipped retrieval model,
and searches for captions of some of them. Brute force is the inner product, in float64, with every embedding in the
index; for some images the embedding is computed again and compared.

    python benchmarks/search.py --output benchmarks/results/search.json
    python benchmarks/search.py --images 200 --queries 10   # a quick trial
"""

import functools
import tempfile
from pathlib import Path

import faiss
import numpy as np
import torch
from PIL import Image
from reporting import EXAMPLES, environment, make_parser, print_table, settings_of, write_json
from timing import timed

from madtp_hf.checkpoints.load import load
from madtp_hf.data.digit_scenes import describe_from_all_sides, draw_scenes
from madtp_hf.search import encode_images, encode_texts, index_images, load_index, search


MODEL = EXAMPLES / "blip-retrieval-digits"
TOP_K = 10


def draw(folder: Path, number: int, seed: int) -> list[str]:
    """Write the scenes as files; return a caption of each, read from one of its four sides."""
    rng, captions = np.random.default_rng(seed), []
    for start in range(0, number, 250):
        scenes = draw_scenes(min(250, number - start), "test", rng)
        for index in range(len(scenes)):
            Image.fromarray(scenes.images[index]).save(folder / f"{start + index:06}.png")
            captions.append(describe_from_all_sides(scenes, index)[rng.integers(4)])
    return captions


def row_of(hit: dict) -> int:
    return int(Path(hit["path"]).stem)


def ask(index, captions: list[str], asked: np.ndarray, brute_force: list[np.ndarray], **options) -> dict:
    """Return the time per query, how many captions find their own scene first, and the overlap with brute force."""
    search(index, captions[0], TOP_K, **options)  # loads the model if necessary
    seconds, first, shared, equal = [], [], [], []
    for row, products in zip(asked, brute_force):
        spent, hits = timed(functools.partial(search, index, captions[row], TOP_K, **options))
        seconds.append(spent)
        first.append(row_of(hits[0]) == row)
        # Compare by value, since two images may have equal scores.
        exact, found = np.sort(products)[::-1][:TOP_K], products[[row_of(hit) for hit in hits]]
        shared.append(np.mean(np.sort(found)[::-1] >= exact[-1] - 1e-6))
        equal.append(np.allclose(np.sort(found)[::-1], exact, atol=1e-6))
    median, slow = np.quantile(seconds, (0.5, 0.95)) * 1000
    return {
        "median ms": round(median, 2),
        "95th percentile ms": round(slow, 2),
        "scene comes first": round(float(np.mean(first)), 4),
        "of brute force's images": round(float(np.mean(shared)), 4),
        "equal to brute force": bool(np.all(equal)),
    }


def main(arguments=None):
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    loaded = load(MODEL, device="cpu")
    model, processor = loaded.model, loaded.processor
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        photos, flat = Path(scratch, "photos"), Path(scratch, "flat")
        photos.mkdir()
        captions = draw(photos, args.images, args.seed)
        update = functools.partial(index_images, model, processor, photos, flat)
        embedding, _ = timed(lambda: update(batch_size=64))
        updating, again = timed(lambda: update(batch_size=64))
        rng = np.random.default_rng(args.seed)
        asked = rng.choice(args.images, args.queries, replace=False)
        vectors = again.vectors.reconstruct_n(0, len(again)).astype(np.float64)
        texts = encode_texts(model, processor, [captions[row] for row in asked]).astype(np.float64)
        brute_force = [vectors @ text for text in texts]
        some = np.sort(rng.choice(args.images, min(256, args.images), replace=False))
        computed = encode_images(model, processor, [again.path(row) for row in some])
        for kind in ("flat", "hnsw", "ivf"):
            update(kind=kind)  # embeds nothing; builds another kind of index from the same vectors
            loading, index = timed(lambda: load_index(flat))
            found = ask(index, captions, asked, brute_force, rerank=False)
            results[kind] = {"loading ms": round(loading * 1000, 2), **found}
        results[f"ivf, {TOP_K} re-ranked"] = ask(load_index(flat), captions, asked, brute_force)
    title = f"{args.queries} captions asked of {args.images} digit scenes, the nearest {TOP_K}"
    content = {
        "title": title,
        "settings": settings_of(args),
        **environment(packages=("faiss-cpu",)),
        "embedding": {"seconds": round(embedding, 1), "images per second": round(args.images / embedding, 1)},
        "updating, nothing new": {"seconds": round(updating, 2), "kept": again.kept, "embedded": again.embedded},
        "largest difference of an embedding computed again": float(np.abs(computed - vectors[some]).max()),
        "results": results,
    }
    columns = list(results["flat"])
    print_table(title, ["index", *columns], [[kind, *map(of.get, columns)] for kind, of in results.items()])
    for name in ("embedding", "updating, nothing new", "largest difference of an embedding computed again"):
        print(f"{name}: {content[name]}")
    write_json(args.output, content)


if __name__ == "__main__":
    main()
