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
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from methods import find_schedule, make_method
from torch.utils.data import DataLoader
from transformers import CLIPProcessor, TrainingArguments, set_seed

from madtp_hf import MadtpClipModel, RetrievalTrainer, calibrate, create_optimizer
from madtp_hf.budgets.passes import measure
from madtp_hf.data import RetrievalCollator, load_digit_captions
from madtp_hf.tasks.clip import score_by_features
from madtp_hf.tasks.pair_scores import CaptionedImages


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "run_clip_retrieval.py"
MODEL = ROOT / "examples" / "clip-digits"
KINDS = ("dense", "tome", "training-free", "fine-tuned", "tome fine-tuned")


class Benchmark:
    """The data and the shipped model, loaded lazily."""

    def __init__(self, args):
        self.args = args
        self.processor = CLIPProcessor.from_pretrained(MODEL)
        self.collator = RetrievalCollator(self.processor)
        test = load_digit_captions(args.split, args.images)
        self.queries = CaptionedImages(test, self.processor)
        self.pairs = list(DataLoader(test, 64, collate_fn=self.collator))

    def model(self) -> MadtpClipModel:
        return MadtpClipModel.from_clip(MODEL, num_alignment_tokens=self.args.num_alignment_tokens).float().eval()

    @torch.no_grad()
    def score(self, model) -> dict:
        """Return the mean recall, and the reduction of FLOPs of an image and one of its captions."""
        queries = self.queries
        scores = score_by_features(model.eval(), queries.pixel_batches, queries.input_ids, queries.attention_mask)
        saved = []
        for batch in self.pairs:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
            saved.append(measure(model, inputs, model(**inputs)))
        return {"mean %": queries.recalls(*scores)["mean %"], "reached": torch.cat(saved).mean().item()}

    def with_tome(self, model, reduction: float) -> MadtpClipModel:
        lengths = torch.cat([batch["attention_mask"].sum(dim=1) for batch in self.pairs])
        schedule, _ = find_schedule("tome", model.config, "clip", reduction, lengths)
        model.set_reduction_method(make_method("tome", schedule))
        return model

    # Each method returns {reduction: measurements}.

    def dense(self, seed) -> dict:
        return {0.0: self.score(self.model())}

    @torch.no_grad()
    def facts(self) -> dict:
        """Return the facts of the dense checkpoint's model card: all recalls, and the chance level."""
        queries = self.queries
        scores = score_by_features(self.model(), queries.pixel_batches, queries.input_ids, queries.attention_mask)
        title = f"{self.args.images} images, {len(queries.texts)} captions"
        return {"title": title, "recalls": queries.recalls(*scores), "baseline": queries.by_chance()}

    def tome(self, seed) -> dict:
        return {reduction: self.score(self.with_tome(self.model(), reduction)) for reduction in self.args.reductions}

    def training_free(self, seed) -> dict:
        set_seed(seed)
        model, rows = self.model(), {}
        validation = load_digit_captions("validation", self.args.validation_images)
        calibrate(model, DataLoader(validation, 64, collate_fn=self.collator), self.args.reductions)
        for reduction, *_ in model.config.pruning_schedule:
            model.set_pruning(reduction=reduction)
            rows[reduction] = self.score(model)
        return rows

    def fine_tuned(self, seed) -> dict:
        folder = self.args.work_dir / f"fine-tuned-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(SCRIPT), "--output_dir", str(folder), "--seed", str(seed)]
        command += ["--evaluation_split", self.args.split, "--test_samples", str(self.args.images), *self.args.options]
        command += ["--reductions", *map(str, self.args.reductions)]
        with open(folder / "log", "w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
        outcome = json.loads((folder / "results.json").read_text())
        rows = {
            row["reduction asked"]: {name: row[name] for name in ("mean %", "reached")} for row in outcome["results"]
        }
        return rows

    def tome_fine_tuned(self, seed) -> dict:
        """Fine-tune with Token Merging, with the training settings that the script reports in its results."""
        settings = json.loads((self.args.work_dir / f"fine-tuned-{seed}" / "results.json").read_text())["settings"]
        train = load_digit_captions("train", settings["training rows"])
        rows = {}
        for reduction in self.args.reductions:
            set_seed(seed)
            model = self.with_tome(self.model(), reduction)
            arguments = TrainingArguments(
                str(self.args.work_dir / f"tome-{reduction}-{seed}"),
                per_device_train_batch_size=settings["batch size"],
                num_train_epochs=1,
                learning_rate=settings["learning rate"],
                lr_scheduler_type=settings["learning rate schedule"],
                save_strategy="no",
                report_to="none",
                remove_unused_columns=False,
                use_cpu=True,
                disable_tqdm=True,
                seed=seed,
            )
            RetrievalTrainer(
                model=model,
                args=arguments,
                train_dataset=train,
                data_collator=self.collator,
                optimizers=(create_optimizer(model, settings["learning rate"]), None),
                queue_size=1024,  # the script's default, like the trainer's other settings
            ).train()
            rows[reduction] = self.score(model)
        return rows


def summary(rows: list[dict]) -> list[dict]:
    """Return mean and standard deviation over seeds for each kind and reduction."""
    grouped = {}
    for row in rows:
        for reduction, measured in row["results"].items():
            grouped.setdefault((row["kind"], float(reduction)), []).append(measured)
    return [
        {
            "kind": kind,
            "reduction": reduction,
            "seeds": len(found),
            "mean %": statistics.mean(one["mean %"] for one in found),
            "standard deviation": statistics.stdev(one["mean %"] for one in found) if len(found) > 1 else None,
            "reached": statistics.mean(one["reached"] for one in found),
        }
        for (kind, reduction), found in sorted(grouped.items(), key=lambda item: (KINDS.index(item[0][0]), item[0][1]))
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", default="test", help="validation, to choose settings")
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--validation_images", type=int, default=512, help="to calibrate on")
    parser.add_argument("--num_alignment_tokens", type=int, default=100, help="of training-free pruning")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="for the training script, last")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/clip-digits"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/clip_digits.json"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="The schedule rests on")

    settings = {
        name: value for name, value in vars(args).items() if name not in ("kinds", "seeds", "work_dir", "output")
    }
    result = {"settings": settings, "rows": []}
    if args.output.exists():
        before = json.loads(args.output.read_text())
        if before["settings"] != settings:
            sys.exit(f"{args.output} has rows of {before['settings']}, not {settings}: give another --output.")
        result = before
    benchmark = Benchmark(args)
    for kind in args.kinds:
        for seed in args.seeds if kind not in ("dense", "tome") else args.seeds[:1]:
            if any((row["kind"], row["seed"]) == (kind, seed) for row in result["rows"]):
                continue
            measured = getattr(benchmark, kind.replace(" ", "_").replace("-", "_"))(seed)
            more = benchmark.facts() if kind == "dense" else {}
            result["rows"].append({"kind": kind, "seed": seed, "results": measured, **more})
            result["summary"] = summary(result["rows"])
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")
            print(kind, seed, json.dumps(measured), flush=True)
    for row in result["summary"]:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
