"""The digit scenes as benchmarks need them: dense models, batches, training, predictions and their score.

A new task needs an entry in `LOADERS` and in `PREDICTORS`, a new model one in `MODELS`.
"""

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from reporting import EXAMPLES, Rows
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from madtp_hf import RetrievalTrainer, create_optimizer
from madtp_hf.budgets.evaluation import evaluate_budgets
from madtp_hf.checkpoints.load import load
from madtp_hf.data import load_digit_captions, load_digit_questions, load_digit_statements
from madtp_hf.data.collators import CaptioningCollator
from madtp_hf.tasks import TASKS


BATCH_SIZE = 64
NUM_ALIGNMENT_TOKENS = 64  # of the rows in benchmarks/results/selection*.json
QUEUE = {"queue_size": 1024, "momentum": 0.995, "distillation": 0.4}  # of these rows, for retrieval
# The dense models of each task, folders in examples/; those that are not there are left out.
MODELS = {
    "vqa": ("blip-vqa-digits", "blip-vqa-digits-plain"),
    "nlvr2": ("blip-nlvr2-digits",),
    "captioning": ("blip-captioning-digits",),
    "retrieval": ("blip-retrieval-digits",),
    "clip": ("clip-digits",),
}
LOADERS = {
    "vqa": load_digit_questions,
    "nlvr2": load_digit_statements,
    "captioning": load_digit_captions,
    "retrieval": load_digit_captions,
    "clip": load_digit_captions,
}


def shipped_models(tasks) -> list[tuple[str, Path]]:
    """(task, folder) of the dense models in examples/ for these tasks."""
    pairs = [(task, EXAMPLES / name) for task in tasks for name in MODELS[task]]
    return [(task, folder) for task, folder in pairs if (folder / "config.json").is_file()]


def load_model(task: str, folder, seed: int = 0, num_alignment_tokens: int = NUM_ALIGNMENT_TOKENS, **overrides):
    """Load a dense model with alignment tokens drawn by `seed`, on the CPU in float32."""
    torch.manual_seed(seed)
    return load(str(folder), task, device="cpu", num_alignment_tokens=num_alignment_tokens, **overrides).model


# Data


def make_collator(task: str, folder):
    """Return the collator of a task and a dense model."""
    loaded = load(str(folder), task, device="cpu")
    return loaded.task.make_collator(loaded.model, loaded.processor)


def with_captions(collator, rows: list[dict]) -> dict[str, torch.Tensor]:
    """A retrieval collator's batch, and all captions of its images: (images, captions of each, length)."""
    captions = [caption for row in rows for caption in row["captions"]]
    words = collator.processor.tokenizer(captions, padding=True, return_tensors="pt")
    batch = collator(rows)
    batch["caption_ids"] = words.input_ids.unflatten(0, (len(rows), -1))
    batch["caption_mask"] = words.attention_mask.unflatten(0, (len(rows), -1))
    return batch


def make_batches(task: str, dataset, collator, batch_size: int = BATCH_SIZE) -> list[dict[str, torch.Tensor]]:
    """All of a data set as batches in memory: a calibration reads them many times."""
    collate = collator
    if TASKS[task].embeds:
        collate = functools.partial(with_captions, collator)
    return list(DataLoader(dataset, batch_size=batch_size, collate_fn=collate))


def smaller_images(batches, size: int) -> list[dict[str, torch.Tensor]]:
    """The batches with square images of another size; the model interpolates its positions."""

    def resize(pixels):
        flat = pixels.flatten(0, -4)
        resized = F.interpolate(flat, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
        return resized.unflatten(0, pixels.shape[:-3])

    # A tensor, as the evaluation hands on tensors alone.
    interpolate = torch.tensor(True)
    return [
        {**batch, "pixel_values": resize(batch["pixel_values"]), "interpolate_pos_encoding": interpolate}
        for batch in batches
    ]


# Training


def train(model, task: str, dataset, collator, callbacks: list, seed: int, learning_rate: float, **settings) -> int:
    """Train one epoch by the demo's recipe: slow alignment parameters, cosine with a warm-up of a twentieth.

    settings: `TrainingArguments` other than these. Returns the number of steps.
    """
    trainer_class = Trainer
    if TASKS[task].embeds:
        trainer_class = functools.partial(RetrievalTrainer, **QUEUE)
    recipe = {"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "per_device_train_batch_size": BATCH_SIZE}
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            learning_rate=learning_rate,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=True,
            disable_tqdm=True,
            seed=seed,
            **{**recipe, **settings},
        )
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=collator,
            callbacks=callbacks,
            optimizers=(create_optimizer(model, learning_rate), None),
        )
        trainer.train()
    model.eval()
    return trainer.state.global_step


def run_example(script: str, folder: Path, options: Iterable) -> dict:
    """Run a training script of examples/ in its own process; return its results and the seconds that it took."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(EXAMPLES / script), "--output_dir", str(folder), *map(str, options)]
    started = time.perf_counter()
    with open(folder / "log", "w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return {**json.loads((folder / "results.json").read_text()), "seconds": time.perf_counter() - started}


# Predictions


def _options(batch) -> dict:
    return {"interpolate_pos_encoding": bool(batch.get("interpolate_pos_encoding", False))}


def answer(model, collator, batch) -> list[str]:
    inputs = (batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
    written = model.generate(*inputs, max_new_tokens=3, **_options(batch))
    return collator.processor.tokenizer.batch_decode(written, skip_special_tokens=True)


def caption(model, collator: CaptioningCollator, batch) -> list[str]:
    """Greedy: the beams of `examples/run_captioning.py` take several times as long."""
    prompt = collator.prompt_ids(len(batch["pixel_values"]))
    room = model.config.text_config.max_position_embeddings - prompt.shape[1]
    written = model.generate(
        pixel_values=batch["pixel_values"], input_ids=prompt, max_new_tokens=room, **_options(batch)
    )
    captions = collator.processor.tokenizer.batch_decode(written, skip_special_tokens=True)
    return [text.removeprefix(collator.prompt).strip() for text in captions]


@torch.no_grad()
def classify(model, collator, batch) -> list[int]:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    return model(**inputs, **_options(batch)).logits.argmax(dim=-1).tolist()


@torch.no_grad()
def embed(model, collator, batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The feature (E,) of each image and those (captions, E) of its captions, normalised."""

    def normalised(features):
        features = features if isinstance(features, torch.Tensor) else features.pooler_output
        return F.normalize(features, dim=-1)

    images = normalised(model.get_image_features(pixel_values=batch["pixel_values"], **_options(batch)))
    ids, mask = (batch[name].flatten(0, 1) for name in ("caption_ids", "caption_mask"))
    texts = normalised(model.get_text_features(input_ids=ids, attention_mask=mask))
    return list(zip(images, texts.unflatten(0, batch["caption_ids"].shape[:2])))


PREDICTORS = {"vqa": answer, "nlvr2": classify, "captioning": caption, "retrieval": embed, "clip": embed}


# Scores

SCORES: dict[str, Callable] = {}  # of tasks that another score than their headline metric is asked of


class Evaluation:
    """A task's test data in memory, and what a model scores on it by the task's headline metric."""

    def __init__(self, task: str, dataset, collator):
        self.task, self.collator = task, collator
        self.batches = make_batches(task, dataset, collator)
        # Without the images, that scoring would decode.
        self.rows = list(dataset.remove_columns([name for name in dataset.column_names if "image" in name]))

    def score(self, predictions) -> float:
        if self.task in SCORES:
            return SCORES[self.task](predictions, self.rows)
        task = TASKS[self.task]
        if task.embeds:
            images, texts = zip(*predictions)
            similarity = torch.stack(images) @ torch.cat(texts).T
            predictions = similarity, similarity.T
        return float(task.score(predictions, self.rows)[task.headline])

    def at(self, model, reductions: list[float], batches=None) -> list[dict]:
        """One point for each reduction of the model's schedule; 0: no pruning, or the method of fixed numbers that is
        set."""

        def predict(batch):
            return PREDICTORS[self.task](model, self.collator, batch)

        results = evaluate_budgets(model, batches or self.batches, reductions, predict)
        return [
            {
                "asked": result.reduction_asked,
                "reached": round(result.reduction_reached, 4),
                "score": round(self.score(result.predictions), 5),
                "mflops": round(1e3 * result.gflops, 3),
            }
            for result in results
        ]


# A study of methods

KEY = ("task", "model", "method", "seed")
MISSED = 0.03  # a point whose reduction differs by more from the one asked for is marked


def run_study(args, header: dict, keys: list[tuple], prepare_data: Callable, make_points: Callable) -> None:
    """Make the rows that are asked for and not there yet.

    keys: (task, folder, method, seed) of each row, in order. prepare_data(task, collator): an `Evaluation`, and
    batches to calibrate on. make_points(task, folder, method, seed, evaluation, validation): a row's points, and its
    further columns.
    """
    results = Rows(args.output, header, KEY)
    names = {(task, folder.name, *rest): (task, folder, *rest) for task, folder, *rest in keys}
    results.forget([key for key in names if key[2] in args.redo])
    loaded, prepared = None, ()
    for key, (task, folder, method, seed) in names.items():
        if key in results:
            continue
        if loaded != (task, folder):
            loaded, prepared = (task, folder), prepare_data(task, make_collator(task, folder))
        started = time.perf_counter()
        points, more = make_points(task, folder, method, seed, *prepared)
        points = [
            point | {"missed": True} if abs(point["reached"] - point["asked"]) > MISSED else point for point in points
        ]
        seconds = round(time.perf_counter() - started, 1)
        results.add({**dict(zip(KEY, key)), **more, "points": points, "seconds": seconds})
        print(*key, *(f"{point['reached']:.3f}: {point['score']:.4f}" for point in points), flush=True)
