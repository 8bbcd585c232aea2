r"""Prune CLIP for image-text retrieval: fine-tune it under pruning, or dense, evaluate it at several budgets, save it.

    python examples/run_clip_retrieval.py                                      # on the digit scenes
    python examples/run_clip_retrieval.py --dataset flickr30k/ --model openai/clip-vit-base-patch16 \
        --learning_rate 1e-5 --queue_size 57600 --train_samples 0 --test_samples 0
    accelerate launch --num_processes 2 examples/run_clip_retrieval.py --per_device_train_batch_size 32

All of `TrainingArguments` are options as well.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import CLIPProcessor, TrainingArguments, set_seed

from madtp_hf import MadtpClipModel, RetrievalTrainer, calibrate, create_optimizer
from madtp_hf.data import RetrievalCollator
from madtp_hf.evaluation import evaluate_budgets, report
from madtp_hf.model_card import write_model_card
from madtp_hf.retrieval import CaptionedImages, retrieval_rows, score_by_features
from madtp_hf.training.arguments import PruningArguments, RetrievalArguments, ScriptParser


@dataclass
class Arguments(RetrievalArguments):
    model: str = field(
        default=str(Path(__file__).parent / "clip-digits"),
        metadata={"help": "A dense CLIP, or a pruned model to go on with: a folder or Hub id."},
    )


def main():
    parser = ScriptParser(
        (Arguments, PruningArguments, TrainingArguments),
        description=__doc__,
        output_dir="outputs/clip",
        do_train=True,
        train_samples=6400,
        validation_samples=256,
        num_alignment_tokens=100,
        alignment_dim=0,  # the text tower's: each layer has a map to it
        per_device_train_batch_size=64,
        per_device_eval_batch_size=64,
        num_train_epochs=1,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
    )
    args, pruning_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    # 1. Model and data.
    processor = CLIPProcessor.from_pretrained(args.model)
    model = pruning_args.load_model(MadtpClipModel, args.model)
    collator = RetrievalCollator(processor, args.max_length)
    with training_args.main_process_first():
        train, validation, test = args.load_data()
    validation_batches = DataLoader(
        validation, batch_size=training_args.per_device_eval_batch_size, collate_fn=collator
    )
    queries = CaptionedImages(test, processor, args.max_length, training_args.per_device_eval_batch_size)

    # 2. Fine-tuning. Under pruning, the callback steers the temperature; calibration tells it where to begin.
    if not pruning_args.dense:
        reductions = pruning_args.target_reduction if training_args.do_train else pruning_args.reductions
        calibrate(model, validation_batches, reductions)
    trainer = RetrievalTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        data_collator=collator,
        callbacks=pruning_args.callbacks(),
        optimizers=(create_optimizer(model, training_args.learning_rate), None),
        queue_size=args.queue_size,
        momentum=args.momentum,
        distillation=args.distillation,
    )

    def score_at(reduction):
        model.eval()
        model.set_pruning(reduction=reduction)
        started = time.perf_counter()
        scores = score_by_features(model, queries.pixel_batches, queries.input_ids, queries.attention_mask)
        return queries.recalls(*scores), time.perf_counter() - started

    before, _ = score_at(0.0)
    if training_args.do_train:
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        if not pruning_args.dense:
            calibrate(model, validation_batches, pruning_args.reductions)

    # 3. Every budget, from the one model. FLOPs are those of an image and one of its captions.
    loader = trainer.accelerator.prepare(
        DataLoader(test, batch_size=training_args.per_device_eval_batch_size, collate_fn=collator)
    )

    def similarities(batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        return model(**inputs).logits_per_image.diag().tolist()

    budgets = pruning_args.budgets(model)
    costs = evaluate_budgets(model, loader, budgets, similarities, trainer.accelerator)
    results = [(cost, *score_at(cost.reduction_asked)) for cost in costs]

    # 4. What is saved is a whole checkpoint with its card, ready to publish.
    if trainer.is_world_process_zero():
        report(
            f"{len(test)} images, {len(queries.texts)} captions",
            retrieval_rows(results),
            training_args.output_dir,
            metric="mean %",
            dense_before_training=before,
            floor=queries.by_chance(),
            dataset=args.dataset_facts(queries.texts[0]),
            settings=pruning_args.settings(args, trainer),
        )
        model.set_pruning(reduction=max(budgets))
        model.save_pretrained(training_args.output_dir)
        processor.save_pretrained(training_args.output_dir)
        write_model_card(training_args.output_dir, base_model=args.model, datasets=args.dataset)
        print(f"Wrote the checkpoint, its card and results.json to {training_args.output_dir}.")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
