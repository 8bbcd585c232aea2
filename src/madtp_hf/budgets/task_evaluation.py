"""Evaluate a model with its task's metric at each budget: predictions, scores and cost on rows of data."""

import itertools
import time
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader

from ..checkpoints.load import make_batches, make_collator
from ..metrics import load_metric
from ..tasks import TASKS
from ..tasks.pair_scores import score_by_features, score_images_and_texts
from .evaluation import budget_rows, evaluate_budgets, prepared
from .passes import restored


ANSWER_TOKENS, CAPTION_TOKENS, CAPTION_BEAMS = 10, 20, 3
CAPTION_METRICS = ("bleu", "cider", "rouge")  # those that need no Java
SHORTLIST = 128


def evaluate_task(model, processor, rows: list[dict], reductions=None, batch_size: int = 16) -> list[dict]:
    """Evaluate a model with its task's metric at several FLOPs reductions.

    Args:
        model: One of this package's models, calibrated unless `reductions` is `[0]`.
        processor: Its processor.
        rows (`list[dict]`): As `madtp_hf.data.rows.load_rows` returns them, with the targets that the metric needs.
        reductions (`list[float]`, *optional*): By default 0 and those of the model's schedule.
        batch_size (`int`, *optional*, defaults to 16): Samples per batch.

    Returns:
        `list[dict]`: one row per budget: `reduction asked`, `reached`, the metric's scores (shares where the name ends
        in "%"), `GFLOPs` of a sample and `time / dense`.

    Raises:
        ValueError: if a row has no target, or a reduction is not in the schedule.
    """
    task = TASKS[model.task]
    for row in rows:
        if not any(row.get(name) not in (None, "", []) for name in task.target_columns):
            raise ValueError(
                f"{row[task.image_columns[0]]} has no {' or '.join(task.target_columns)}: expected them in each row,"
                f" for the metric {task.metric} compares predictions with them."
            )
    if reductions is None:
        reductions = [0.0, *(entry[0] for entry in model.config.pruning_schedule or ())]
    for reduction in reductions:  # fail before minutes of prediction
        model.config.threshold_for(reduction)
    return budget_rows(*zip(*_EVALUATE[task.metric](model, processor, rows, list(reductions), batch_size)))


def _evaluate_predictions(model, batches, reductions, predict: Callable, score: Callable) -> list[tuple]:
    costs = evaluate_budgets(model, batches, reductions, predict)
    return [(cost, score(cost.predictions), cost.seconds) for cost in costs]


def _answers(model, processor, rows, reductions, batch_size):
    metric = load_metric(TASKS[model.task].metric)
    # VQA accuracy expects the answers of ten annotators: up to three true answers are repeated to make ten.
    references = [list(row.get("answers") or [row["answer"]]) for row in rows]
    references = [answers if len(answers) > 3 else (answers * 10)[:10] for answers in references]

    def predict(batch):
        inputs = batch["input_ids"], batch["pixel_values"], batch["attention_mask"]
        written = model.generate(*inputs, max_new_tokens=ANSWER_TOKENS)
        return processor.tokenizer.batch_decode(written, skip_special_tokens=True)

    def score(predictions):
        return {"accuracy %": metric.compute(predictions=predictions, references=references)["accuracy"]}

    return _evaluate_predictions(model, make_batches(model, processor, rows, batch_size), reductions, predict, score)


def _statements(model, processor, rows, reductions, batch_size):
    metric = load_metric(TASKS[model.task].metric)

    def predict(batch):
        return model(**{name: value for name, value in batch.items() if name != "labels"}).logits.argmax(-1).tolist()

    def score(predictions):
        scores = metric.compute(predictions=predictions, references=[row["label"] for row in rows])
        return {f"{name} %": value for name, value in scores.items()}

    return _evaluate_predictions(model, make_batches(model, processor, rows, batch_size), reductions, predict, score)


def _captions(model, processor, rows, reductions, batch_size):
    metric, collator = load_metric(TASKS[model.task].metric), make_collator(model, processor)
    room = model.config.text_config.max_position_embeddings - collator.prompt_ids(1).shape[1]

    def predict(batch):
        written = model.generate(
            pixel_values=batch["pixel_values"],
            input_ids=collator.prompt_ids(len(batch["pixel_values"])).to(model.device),
            num_beams=CAPTION_BEAMS,
            max_new_tokens=min(CAPTION_TOKENS, room),
        )
        captions = processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [caption.removeprefix(collator.prompt).strip() for caption in captions]

    def score(predictions):
        references = [list(row["captions"]) for row in rows]
        scores = metric.compute(predictions=predictions, references=references, metrics=CAPTION_METRICS)
        shown = {name: value for name, value in scores.items() if name not in ("bleu_1", "bleu_2", "bleu_3")}
        return {f"{name} %" if name == "bleu_4" else name: value for name, value in shown.items()}

    return _evaluate_predictions(model, make_batches(model, processor, rows, batch_size), reductions, predict, score)


@torch.no_grad()
def _retrieval(model, processor, rows, reductions, batch_size):
    """Score all images against all captions; a sample's cost is that of one image and one of its captions."""
    metric, collator = load_metric(TASKS[model.task].metric), make_collator(model, processor)
    texts = [caption for row in rows for caption in row["captions"]]
    starts = itertools.accumulate((len(row["captions"]) for row in rows), initial=0)
    own = [list(range(*span)) for span in itertools.pairwise(starts)]
    encoded = processor.tokenizer(
        texts, padding=True, truncation=True, max_length=collator.max_length, return_tensors="pt"
    )
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=lambda part: collator(part)["pixel_values"])
    is_clip = TASKS[model.task].family == "CLIP"

    def forward(batch):
        names = ("input_ids", "attention_mask", "pixel_values")
        model(**{name: batch[name] for name in names})
        return [None] * len(batch["pixel_values"])

    costs = evaluate_budgets(model, make_batches(model, processor, rows, batch_size), reductions, forward)
    results = []
    with restored(model), prepared(model):
        for cost in costs:
            model.set_pruning(reduction=cost.reduction_asked)
            started = time.perf_counter()
            if is_clip:
                scores = score_by_features(model, loader, encoded.input_ids, encoded.attention_mask)
            else:
                scores = score_images_and_texts(model, loader, encoded.input_ids, encoded.attention_mask, SHORTLIST)
            seconds = time.perf_counter() - started
            recalls = metric.compute(predictions=scores[0].numpy(), references=own, text_to_image=scores[1].numpy())
            named = {f"{name.replace('_recall', '')} %": value for name, value in recalls.items()}
            shown = {name: named[name] for name in ("image_to_text@1 %", "text_to_image@1 %", "mean %")}
            results.append((cost, shown, seconds))
    return results


_EVALUATE = {
    "vqa_accuracy": _answers,
    "nlvr2": _statements,
    "caption_metrics": _captions,
    "retrieval_recall": _retrieval,
}
