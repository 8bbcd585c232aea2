"""Caption images with Ray Data: the same rows as `madtp-hf caption`, on as many machines as the cluster has.

    python examples/caption_with_ray.py org/blip-madtp photos/ captions.jsonl --reduction 0.5 --workers 2
    python examples/caption_with_ray.py org/blip-madtp "s/train-{000..099}.tar" captions.parquet --workers 8 --gpus 1

Ray reads and resizes images in separate tasks, and keeps a model in each of `--workers` actors. A row that can't be
read becomes a row with an error; it is listed beside the output. All machines must see IMAGES under the same path.
"""

import argparse
import os


os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray

from madtp_hf.jobs import Generation, ImageToText, Output, PreparedBatches, finish_batch, open_rows, places


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a pruned checkpoint: a folder or Hub id")
    parser.add_argument("images", help="a folder, list, parquet files, tars or data set")
    parser.add_argument("out", help="captions.jsonl or captions.parquet")
    parser.add_argument("--workers", type=int, default=2, help="models at work at the same time")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs for each of them")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--reduction", type=float)
    parser.add_argument("--num_beams", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=30)
    return parser.parse_args()


class Read:
    """Reads and resizes the images of a batch's place; a row of the Ray data set is a whole batch."""

    def __init__(self, images: str, model: str):
        from transformers import AutoProcessor

        self.batches = PreparedBatches(open_rows(images), AutoProcessor.from_pretrained(model).image_processor)

    def __call__(self, place: dict) -> dict:
        return {"batch": self.batches[tuple(int(place[name]) for name in ("part", "start", "stop"))]}


class Caption:
    """Generates captions with a model that stays in an actor."""

    def __init__(self, model: str, generation: Generation):
        self.write = ImageToText(model, "captioning", generation)

    def __call__(self, row: dict) -> list[dict]:
        rows = finish_batch(row["batch"], self.write, "caption")
        return [{"caption": None, "error": None, **row} for row in rows]


def main():
    args = parse_args()
    source = open_rows(args.images)
    generation = Generation(args.reduction, max_new_tokens=args.max_new_tokens, num_beams=args.num_beams)
    output = Output(args.out, {"ray": True, **vars(generation)}, len(source), "caption")
    output.begin(force=True)
    names = ("part", "start", "stop")
    todo = [dict(zip(names, place)) for place in places(output, output.missing_parts(), args.batch_size)]

    if not ray.is_initialized():
        ray.init(num_cpus=args.workers + 1, include_dashboard=False, object_store_memory=512 * 2**20)
    ray.data.DataContext.get_current().enable_progress_bars = False
    captions = (
        ray.data.from_items(todo, override_num_blocks=max(1, min(len(todo), 16 * args.workers)))
        .map(Read, fn_constructor_args=(args.images, args.model), compute=ray.data.ActorPoolStrategy(size=1))
        .flat_map(
            Caption,
            fn_constructor_args=(args.model, generation),
            compute=ray.data.ActorPoolStrategy(size=args.workers),
            num_cpus=0.5,
            num_gpus=args.gpus,
        )
    )
    # Blocks arrive in any order; a part is written once all its rows have arrived.
    waiting: dict[int, list] = {}
    for row in captions.iter_rows():
        # Restore the command's order of columns, which Ray does not keep.
        row = {name: row[name] for name in ("row", "key", "caption", "error") if row[name] is not None}
        part = row["row"] // output.rows_per_part
        waiting.setdefault(part, []).append(row)
        first, stop = output.part_rows(part)
        if len(waiting[part]) == stop - first:
            output.write_part(part, sorted(waiting.pop(part), key=lambda row: row["row"]))
    counts = output.finish()
    print(
        f"{output.out}: {counts.images} images, {counts.errors} errors"
        + f", listed in {output.errors_file}" * bool(counts.errors)
    )


if __name__ == "__main__":
    main()
