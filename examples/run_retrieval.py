"""Prune BLIP for image-text retrieval: fine-tune it under pruning (or dense), evaluate it at several budgets, save it.

    python examples/run_retrieval.py                                           # on the digit scenes
    python examples/run_retrieval.py --dataset flickr30k/ --model Salesforce/blip-itm-base-flickr \\
        --output_dir outputs/retrieval
    accelerate launch --num_processes 2 examples/run_retrieval.py --per_device_train_batch_size 32

All options of `TrainingArguments` are accepted as well.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from script_arguments import ContrastiveArguments, DataArguments, PruningArguments, ScriptParser, save_run
from torch.utils.data import DataLoader
from transformers import TrainingArguments, set_seed

from madtp_hf import RetrievalTrainer, calibrate, create_optimizer
from madtp_hf.budgets.evaluation import budget_rows, evaluate_budgets
from madtp_hf.data import RetrievalCollator, load_coco_captions, load_digit_captions, load_flickr30k
from madtp_hf.tasks.pair_scores import CaptionedImages, shown_recalls
from madtp_hf.tasks.retrieval import score_images_and_texts


@dataclass
class Arguments(ContrastiveArguments, DataArguments):
    model: str = field(
        default=str(Path(__file__).parent / "blip-retrieval-digits"),
        metadata={"help": "A dense BLIP for retrieval, or a pruned model to continue with: a folder or Hub id."},
    )
    test_samples: int | None = field(default=250, metadata={"help": "Images to evaluate on; 0 for all."})
    k: int = field(
        default=16, metadata={"help": "How long the shortlists are; BLIP: 128 for Flickr30k, 256 for COCO."}
    )


def parse_arguments():
    parser = ScriptParser(
        (Arguments, PruningArguments, TrainingArguments),
        description=__doc__,
        output_dir="outputs/retrieval",
        learning_rate=1e-4,
    )
    return parser.parse_args_into_dataclasses()


def main():
    args, pruning_args, training_args = parse_arguments()
    set_seed(training_args.seed)

    # 1. Load model and data.
    model, processor = pruning_args.load(args.model, "retrieval")
    collator = RetrievalCollator(processor, args.max_length)
    with training_args.main_process_first():
        load_published = load_flickr30k if "flickr" in (args.dataset or "").lower() else load_coco_captions
        train, validation, test = args.load(load_digit_captions, load_published)
    train_batches, validation_batches, test_batches = (
        DataLoader(rows, batch_size=training_args.per_device_eval_batch_size, collate_fn=collator)
        for rows in (train, validation, test)
    )

    # 2. Set up fine-tuning. Under pruning, the callback controls the temperature, starting from the calibrated one.
    pruning_args.prepare(model, train_batches, validation_batches, training_args)
    trainer = RetrievalTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        data_collator=collator,
        callbacks=pruning_args.callbacks(),
        optimizers=(
            create_optimizer(model, training_args.learning_rate, weight_decay=training_args.weight_decay),
            None,
        ),
        queue_size=args.queue_size,
        momentum=args.momentum,
        distillation=args.distillation,
        distillation_warmup_steps=args.distillation_warmup_steps,
    )
    # 3. Define the scores of all images against all captions, and their metric, before training.
    queries, validation_queries = (
        CaptionedImages(rows, processor, args.max_length, training_args.per_device_eval_batch_size)
        for rows in (test, validation.select(range(min(len(validation), len(test)))))
    )

    def score_at(reduction, queries=queries):
        model.eval()
        model.set_pruning(reduction=reduction)
        started = time.perf_counter()
        texts = (queries.input_ids, queries.attention_mask)
        scores = score_images_and_texts(model, queries.pixel_batches, *texts, args.k)
        return queries.recalls(*scores), time.perf_counter() - started

    before, _ = score_at(0.0)

    # 4. Train, then evaluate this one model at every budget. FLOPs are those of matching an image with one of its
    # captions.
    if training_args.do_train:
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        if not pruning_args.dense:
            calibrate(model, validation_batches, pruning_args.reductions)
    test_batches = trainer.accelerator.prepare(test_batches)

    budgets = pruning_args.budgets(model)
    costs = evaluate_budgets(model, test_batches, budgets, accelerator=trainer.accelerator)
    recalls, seconds = zip(*(score_at(cost.reduction_asked) for cost in costs))
    on_validation = {reduction: score_at(reduction, validation_queries)[0]["mean %"] for reduction in budgets}

    # 5. Save a complete checkpoint with its model card, ready to publish: `AutoModel.from_pretrained(folder,
    # trust_remote_code=True)`.
    if trainer.is_world_process_zero():
        save_run(
            model,
            processor,
            training_args.output_dir,
            f"{len(test)} images, {len(queries.texts)} captions",
            budget_rows(costs, [shown_recalls(found) for found in recalls], seconds),
            metric="mean %",
            validation=(len(validation_queries), on_validation),
            dense_before_training=before,
            baseline=queries.by_chance(),
            dataset=args.facts(queries.texts[0]),
            settings=pruning_args.settings(args, trainer),
            base_model=args.model,
            datasets=args.dataset,
        )
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
