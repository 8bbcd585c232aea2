"""Run what several processes must do like a single one: train each task, evaluate budgets, gather rows.

`tests/test_distributed.py` runs it under torchrun with two processes, calls its functions with one, and compares.

    torchrun --nproc_per_node 2 -m tests.helpers.two_process_training FOLDER
"""

import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from madtp_hf import (
    MadtpBlipForConditionalGeneration,
    MadtpBlipForImagesAndTextClassification,
    MadtpBlipForImageTextRetrieval,
    MadtpBlipForQuestionAnswering,
    MadtpClipModel,
    ReductionCallback,
    RetrievalTrainer,
)
from madtp_hf.budgets.evaluation import evaluate_budgets
from madtp_hf.modeling import madtp_blip_losses
from madtp_hf.modeling.retrieval_loss import gather_padded, gather_rows, is_distributed, process_rank
from madtp_hf.tasks.retrieval import score_images_and_texts

from ..conftest import blip_config, make_inputs
from ..test_examples import run_example
from .clip import make_clip_inputs, make_clip_model


GLOBAL_BATCH = 8
STEPS = 4
EVALUATED = (1, 5, 7, 8)  # sample counts that don't fill the processes' batches of 2
# For each run: the task's class and whether it uses the trainer with a memory.
RUNS = {
    "vqa": (MadtpBlipForQuestionAnswering, False),
    "captioning": (MadtpBlipForConditionalGeneration, False),
    "nlvr2": (MadtpBlipForImagesAndTextClassification, False),
    "retrieval": (MadtpBlipForImageTextRetrieval, True),
    "retrieval_alone": (MadtpBlipForImageTextRetrieval, False),
    "retrieval_resumed": (MadtpBlipForImageTextRetrieval, True),
    "clip": (MadtpClipModel, True),
}


def make_model(model_class):
    """Build a small random model."""
    if model_class is MadtpClipModel:
        return make_clip_model()
    torch.manual_seed(1)
    blip_class = {
        MadtpBlipForConditionalGeneration: BlipForConditionalGeneration,
        MadtpBlipForImageTextRetrieval: BlipForImageTextRetrieval,
    }.get(model_class, BlipForQuestionAnswering)
    model = model_class.from_blip(blip_class(blip_config(image_text_hidden_size=16)), num_alignment_tokens=12)
    return model


def make_rows(model_class, count):
    """Return rows whose answers and captions all have one length.

    Otherwise the mean of the processes' losses, each a mean over tokens, would differ from the mean over all tokens.
    """
    captioning, clip = model_class is MadtpBlipForConditionalGeneration, model_class is MadtpClipModel
    make = make_clip_inputs if clip else make_inputs
    inputs = make([8 if captioning else 4 + index * 5 % 7 for index in range(count)], seed=3)
    if clip:
        inputs["image_ids"] = torch.arange(count) // 3
    elif captioning:
        inputs["labels"] = inputs["input_ids"]
    elif model_class is MadtpBlipForImagesAndTextClassification:
        inputs["pixel_values"] = torch.stack([inputs["pixel_values"], inputs["pixel_values"].flip(0)], dim=1)
        inputs["labels"] = torch.arange(count) % 2
    elif model_class is MadtpBlipForImageTextRetrieval:
        inputs.pop("labels")
        inputs["image_ids"] = torch.arange(count) // 3
    inputs["index"] = torch.arange(count)
    return [{name: value[index] for name, value in inputs.items()} for index in range(count)]


def collate(rows):
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {**batch, "return_loss": True} if "image_ids" in batch else batch


def without_index(batch):
    return {name: value for name, value in batch.items() if name != "index"}


def most_similar(feature, other_features, ids, other_ids, temperature):
    """Return the hardest negatives, instead of drawing hard negatives, which each process does separately."""
    similarity = (feature @ other_features.T).masked_fill(ids.unsqueeze(1) == other_ids, -torch.inf)
    return torch.arange(len(ids)), similarity.argmax(dim=1)


class FirstGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def run_training(run, folder, processes) -> dict:
    """Train and return the values to compare: first gradients, last weights, the memory and the temperatures."""
    model_class, with_memory = RUNS[run]
    accumulated = 2 if with_memory else 1
    settings = {
        "output_dir": str(folder / run.removesuffix("_resumed")),
        "max_steps": STEPS,
        "per_device_train_batch_size": GLOBAL_BATCH // accumulated // processes,
        "gradient_accumulation_steps": accumulated,
        "optim": "sgd",  # Adam would amplify small differences
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,  # clipping would hide a wrong scale
        "ddp_find_unused_parameters": False,
        "ddp_timeout": 60,
        "logging_steps": 1,
        "save_strategy": "steps" if run == "retrieval" else "no",
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "restore_callback_states_from_checkpoint": True,
    }
    settings = TrainingArguments(**settings)  # this starts the process group
    model = make_model(model_class)
    if process_rank() > 0:  # without a common seed, new parameters differ between processes
        torch.nn.init.normal_(model.alignment.tokens)
    callback, first = ReductionCallback((0.3, 0.5), num_targets=2), FirstGradients()
    options = {"queue_size": 20, "momentum": 0.8} if with_memory else {}
    trainer = (RetrievalTrainer if with_memory else Trainer)(
        model=model,
        args=settings,
        train_dataset=make_rows(model_class, 2 * GLOBAL_BATCH),
        data_collator=lambda rows: without_index(collate(rows)),
        callbacks=[callback, first],
        **options,
    )
    checkpoint = str(Path(settings.output_dir) / "checkpoint-2") if run.endswith("_resumed") else None
    with mock.patch.object(madtp_blip_losses, "draw_hard_negatives", most_similar):
        trainer.train(resume_from_checkpoint=checkpoint)
    if checkpoint:  # the checkpoint restored its own callback
        callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ReductionCallback))
    return {
        "gradients": getattr(first, "gradients", {}),
        "weights": model.state_dict(),
        "memory": trainer.memory.state_dict() if with_memory else {},
        "temperatures": {"log": torch.tensor(callback.points)},
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def run_evaluation(count, accelerator=None) -> list[tuple]:
    """Return each budget's predictions, which name their samples, its reduction and its GFLOPs."""
    model_class = MadtpBlipForImagesAndTextClassification
    model = make_model(model_class)
    model.config.pruning_schedule = [[0.2, 0.5], [0.4, 2.0]]
    loader = DataLoader(make_rows(model_class, count), batch_size=2, collate_fn=collate)
    if accelerator is not None:
        loader = accelerator.prepare(loader)

    def predict(batch):
        margins = model(**without_index(batch)).logits.diff(dim=1).flatten()
        return list(zip(batch["index"].tolist(), margins.tolist()))

    results = evaluate_budgets(model, loader, [0.0, 0.2, 0.4], predict, accelerator)
    return [(result.predictions, result.reduction_reached, result.gflops) for result in results]


def run_scoring() -> tuple[torch.Tensor, torch.Tensor]:
    model = make_model(MadtpBlipForImageTextRetrieval).eval()
    model.set_pruning(temperature=1.0)
    inputs = make_inputs((9, 5, 7, 4, 8), seed=5)
    images = inputs["pixel_values"][:3].split(2)
    return score_images_and_texts(model, images, inputs["input_ids"], inputs["attention_mask"], k=2, batch_size=2)


def run_gathering() -> dict:
    """Gather 2 sequences of 3 + 2 r from rank r; the loss is r + 1 times the sum of squares of all gathered rows."""
    rank = process_rank()
    rows = (torch.arange(2 * (3 + 2 * rank) * 4).view(2, 3 + 2 * rank, 4) + 100.0 * rank).requires_grad_()
    mask = None if rank == 0 else torch.tensor([[True] * 5, [True] * 4 + [False]])
    gathered, gathered_mask = gather_padded(rows, mask)
    ((rank + 1) * gathered.pow(2).sum()).backward()
    ids = gather_rows(torch.tensor([10 * rank, 10 * rank + 1]))
    return {
        "gathered": gathered.detach(),
        "mask": gathered_mask,
        "rows": rows.detach(),
        "gradient": rows.grad,
        "ids": ids,
    }


def main(folder: Path):
    torch.set_num_threads(1)
    results = {run: run_training(run, folder, 2) for run in RUNS}
    assert is_distributed(), "run this under torchrun, with two processes"
    accelerator = Accelerator(cpu=True)
    results["evaluation"] = {count: run_evaluation(count, accelerator) for count in EVALUATED}
    results["scoring"] = run_scoring()
    results["gathering"] = run_gathering()
    torch.save(results, folder / f"rank{process_rank()}.pt")
    run_example("retrieval", folder / "dense", folder / "pruned-twice")  # this ends the process group


if __name__ == "__main__":
    main(Path(sys.argv[1]))
