"""Measure what pruning costs CLIP on digit scenes: mean recall, dense, pruned, and fine-tuned under pruning.

    python benchmarks/clip_digits.py --output benchmarks/results/clip_digits.json

Each row is measured once and kept in the file, so that an interrupted run can resume:

- `dense`: the shipped checkpoint;
- `tome`: the same weights with Token Merging of the image tokens, at each reduction of the pair's FLOPs, not trained;
- `training-free`: MADTP on the same weights, random alignment tokens, calibrated; one row per seed;
- `fine-tuned`: `examples/run_clip_retrieval.py` as is, one checkpoint for all reductions; one row per seed;
- `tome fine-tuned`: the same training with Token Merging, one checkpoint for each reduction; one row per seed.

Recall is the mean over 1, 5 and 10 and both directions, among the images of the test split and all their captions.
"""

import argparse
import json
import statistics
from pathlib import Path

from calibrating import calibrate_all
from digit_tasks import Evaluation, load_model, make_batches, make_collator, run_example, train
from reporting import EXAMPLES, Rows, environment, make_parser, mean_and_deviation, print_table, settings_of
from transformers import set_seed

from madtp_hf.data import load_digit_captions
from madtp_hf.tasks.clip import score_by_features
from madtp_hf.tasks.pair_scores import CaptionedImages


SCRIPT, MODEL = "run_clip_retrieval.py", EXAMPLES / "clip-digits"


class Benchmark:
    """The data and the shipped model, loaded lazily. Each kind of row is a method: seed -> points, one a reduction."""

    def __init__(self, args):
        self.args, self.collator = args, make_collator("clip", MODEL)
        self.test = load_digit_captions(args.split, args.images)
        self.evaluation = Evaluation("clip", self.test, self.collator)

    def model(self, seed: int = 0):
        return load_model("clip", MODEL, seed, num_alignment_tokens=self.args.num_alignment_tokens)

    def score(self, model, reductions=(0.0,)) -> dict:
        points = self.evaluation.at(model, list(reductions))
        return {str(point["asked"]): {"mean %": point["score"], "reached": point["reached"]} for point in points}

    def facts(self) -> dict:
        """Return the facts of the dense checkpoint's model card: all recalls, and the chance level."""
        queries = CaptionedImages(self.test, self.collator.processor)
        scores = score_by_features(self.model(), queries.pixel_batches, queries.input_ids, queries.attention_mask)
        title = f"{self.args.images} images, {len(queries.texts)} captions"
        return {"title": title, "recalls": queries.recalls(*scores), "baseline": queries.by_chance()}

    def dense(self, seed) -> dict:
        return self.score(self.model())

    def tome_model(self, seed=0):
        """Return a model that prunes by Token Merging, calibrated on the images of the evaluation."""
        model = self.model(seed)
        model.set_pruning_method("tome")
        calibrate_all(model, self.evaluation.batches, self.args.reductions)
        return model

    def tome(self, seed) -> dict:
        return self.score(self.tome_model(), self.args.reductions)

    def training_free(self, seed) -> dict:
        model = self.model(seed)
        validation = load_digit_captions("validation", self.args.validation_images)
        batches = make_batches("clip", validation, self.collator)
        return self.score(model, calibrate_all(model, batches, self.args.reductions))

    def folder(self, seed) -> Path:
        return self.args.work_dir / f"fine-tuned-{seed}"

    def fine_tuned(self, seed) -> dict:
        options = ["--seed", seed, "--test_split", self.args.split, "--test_samples", self.args.images]
        options += [*self.args.options, "--reductions", *self.args.reductions]
        rows = run_example(SCRIPT, self.folder(seed), options)["results"]
        return {str(row["reduction asked"]): {name: row[name] for name in ("mean %", "reached")} for row in rows}

    def tome_fine_tuned(self, seed) -> dict:
        """Fine-tune with Token Merging, with the training settings that the script reports in its results."""
        settings = json.loads((self.folder(seed) / "results.json").read_text())["settings"]
        dataset, rows = load_digit_captions("train", settings["training rows"]), {}
        recipe = {
            "per_device_train_batch_size": settings["batch size"],
            "lr_scheduler_type": settings["learning rate schedule"],
            "warmup_steps": 0,
        }
        for reduction in self.args.reductions:
            set_seed(seed)
            model = self.tome_model(seed)
            model.set_pruning(reduction=reduction)
            train(model, "clip", dataset, self.collator, [], seed, settings["learning rate"], **recipe)
            rows |= self.score(model, [reduction])
        return rows


# By kind, the method that makes its rows.
KINDS = {
    "dense": Benchmark.dense,
    "tome": Benchmark.tome,
    "training-free": Benchmark.training_free,
    "fine-tuned": Benchmark.fine_tuned,
    "tome fine-tuned": Benchmark.tome_fine_tuned,
}


def summary(rows: list[dict]) -> list[dict]:
    """Return mean and standard deviation over seeds for each kind and reduction."""
    grouped = {}
    for row in rows:
        for reduction, measured in row["results"].items():
            grouped.setdefault((row["kind"], float(reduction)), []).append(measured)
    lines = []
    for kind, reduction in sorted(grouped, key=lambda key: (list(KINDS).index(key[0]), key[1])):
        found = grouped[kind, reduction]
        mean, deviation = mean_and_deviation([one["mean %"] for one in found])
        reached = statistics.fmean(one["reached"] for one in found)
        line = {"kind": kind, "reduction": reduction, "seeds": len(found), "mean %": mean}
        lines.append({**line, "standard deviation": deviation, "reached": reached})
    return lines


def main(arguments=None):
    parser = make_parser(__doc__, "clip_digits.json")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", default="test", help="The split to evaluate on; validation to choose settings.")
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--validation_images", type=int, default=512, help="Images to calibrate on.")
    parser.add_argument(
        "--num_alignment_tokens", type=int, default=100, help="Alignment tokens of training-free pruning."
    )
    parser.add_argument(
        "--options", nargs=argparse.REMAINDER, default=[], help="Options for the training script; must come last."
    )
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/clip-digits"))
    args = parser.parse_args(arguments)
    header = {"settings": settings_of(args, "kinds", "seeds", "work_dir"), **environment(), "summary": []}
    results, benchmark = Rows(args.output, header, ("kind", "seed")), Benchmark(args)
    for kind in args.kinds:
        for seed in args.seeds if kind not in ("dense", "tome") else args.seeds[:1]:
            if (kind, seed) in results:
                continue
            row = {"kind": kind, "seed": seed, "results": KINDS[kind](benchmark, seed)}
            row |= benchmark.facts() if kind == "dense" else {}
            results.add(row, summary=summary([*results.rows.values(), row]))
            print(kind, seed, json.dumps(row["results"]), flush=True)
    lines = [list(line.values()) for line in summary(list(results.rows.values()))]
    print_table("mean over seeds", ["kind", "reduction", "seeds", "mean %", "deviation", "reached"], lines)


if __name__ == "__main__":
    main()
