"""Prune BLIP for image-text retrieval: fine-tune it under pruning, or dense, evaluate it at several budgets, save it.

    python examples/run_retrieval.py                                           # on the digit scenes
    python examples/run_retrieval.py --dataset flickr30k/ --model Salesforce/blip-itm-base-flickr \\
        --queue_size 57600 --output_dir outputs/retrieval
    accelerate launch --num_processes 2 examples/run_retrieval.py --per_device_train_batch_size 32

All of `TrainingArguments` are options as well.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import BlipProcessor, TrainingArguments, set_seed

from madtp_hf import (
    MadtpBlipForImageTextRetrieval,
    RetrievalTrainer,
    calibrate,
    create_optimizer,
)
from madtp_hf.data import RetrievalCollator
from madtp_hf.evaluation import evaluate_budgets, report
from madtp_hf.model_card import write_model_card
from madtp_hf.retrieval import CaptionedImages, retrieval_rows, score_images_and_texts
from madtp_hf.training.arguments import PruningArguments, RetrievalArguments, ScriptParser


@dataclass
class Arguments(RetrievalArguments):
    model: str = field(
        default=str(Path(__file__).parent / "blip-retrieval-digits"),
        metadata={"help": "A dense BLIP for retrieval, or a pruned model to go on with: a folder or Hub id."},
    )
    k: int = field(
        default=16, metadata={"help": "How long the shortlists are; BLIP: 128 for Flickr30k, 256 for COCO."}
    )


def main():
    parser = ScriptParser(
        (Arguments, PruningArguments, TrainingArguments),
        description=__doc__,
        output_dir="outputs/retrieval",
        do_train=True,
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
    processor = BlipProcessor.from_pretrained(args.model)
    model = pruning_args.load_model(MadtpBlipForImageTextRetrieval, args.model)
    collator = RetrievalCollator(processor, args.max_length)
    with training_args.main_process_first():
        train, validation, test = args.load_data()
    validation_batches = DataLoader(
        validation, batch_size=training_args.per_device_eval_batch_size, collate_fn=collator
    )

    # 2. Fine-tuning. Under pruning, the callback steers the temperature; calibration tells it where to begin.
    if not pruning_args.dense:
        calibrate(
            model,
            validation_batches,
            pruning_args.target_reduction if training_args.do_train else pruning_args.reductions,
        )
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
    # 3. All images against all captions, and the score of that, before any training.
    queries = CaptionedImages(test, processor, args.max_length, training_args.per_device_eval_batch_size)

    def score_at(reduction):
        model.eval()
        model.set_pruning(reduction=reduction)
        started = time.perf_counter()
        texts = (queries.input_ids, queries.attention_mask)
        scores = score_images_and_texts(model, queries.pixel_batches, *texts, args.k)
        return queries.recalls(*scores), time.perf_counter() - started

    before, _ = score_at(0.0)

    # 4. Training; then every budget, from the one model. FLOPs are those of matching an image with one of its
    # captions.
    if training_args.do_train:
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        if not pruning_args.dense:
            calibrate(model, validation_batches, pruning_args.reductions)
    loader = trainer.accelerator.prepare(
        DataLoader(test, batch_size=training_args.per_device_eval_batch_size, collate_fn=collator)
    )

    def match(batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        return model(**inputs).itm_score[:, 1].tolist()

    budgets = pruning_args.budgets(model)
    costs = evaluate_budgets(model, loader, budgets, match, trainer.accelerator)
    results = [(cost, *score_at(cost.reduction_asked)) for cost in costs]

    # 5. What is saved is a whole checkpoint with its card, ready to publish: `AutoModel.from_pretrained(folder,
    # trust_remote_code=True)`.
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
