"""Prune BLIP for image-text retrieval: fine-tune it under pruning, or dense, evaluate it at several budgets, save it.

    python examples/run_retrieval.py                                           # on the digit scenes
    python examples/run_retrieval.py --dataset flickr30k/ --model Salesforce/blip-itm-base-flickr --queue_size 57600 --output_dir outputs/retrieval
    accelerate launch --num_processes 2 examples/run_retrieval.py --per_device_train_batch_size 32

All of `TrainingArguments` are options as well.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import BlipProcessor, HfArgumentParser, TrainingArguments, set_seed

from madtp_hf import (
    MadtpBlipForImageTextRetrieval,
    RetrievalTrainer,
    calibrate,
    create_optimizer,
)
from madtp_hf.data import RetrievalCollator, load_coco_captions, load_digit_captions, load_flickr30k
from madtp_hf.evaluation import evaluate_budgets, report
from madtp_hf.metrics import load_metric
from madtp_hf.model_card import public_name, write_model_card
from madtp_hf.retrieval import score_images_and_texts
from madtp_hf.training.arguments import PruningArguments


@dataclass
class Arguments:
    model: str = field(
        default=str(Path(__file__).parent / "blip-retrieval-digits"),
        metadata={"help": "A dense BLIP for retrieval, or a pruned model to go on with: a folder or Hub id."},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "The folder of Flickr30k or COCO, or a Hub id; the digit scenes if not given."}
    )
    image_dir: str | None = field(default=None, metadata={"help": "Its image folder; the data set's if not given."})
    columns: str | None = field(
        default=None, metadata={"help": "What a Hub data set's columns are called, as JSON: ours to theirs."}
    )
    train_samples: int | None = field(default=12800, metadata={"help": "Rows to train on; 0 for all."})
    validation_samples: int | None = field(default=512, metadata={"help": "Rows to calibrate on; 0 for all."})
    test_samples: int | None = field(default=250, metadata={"help": "Images to evaluate on; 0 for all."})
    max_length: int | None = field(default=None, metadata={"help": "Cut captions to so many tokens."})
    k: int = field(
        default=16, metadata={"help": "How long the shortlists are; BLIP: 128 for Flickr30k, 256 for COCO."}
    )
    queue_size: int = field(default=1024, metadata={"help": "Features of earlier batches to contrast with."})
    momentum: float = field(default=0.995, metadata={"help": "How much of the momentum twin stays at a step."})
    distillation: float = field(default=0.4, metadata={"help": "How much of the targets are the twin's."})


def load_data(args, split):
    rows = {"train": args.train_samples, "validation": args.validation_samples, "test": args.test_samples}[split]
    if args.dataset is None:
        return load_digit_captions(split, rows)
    columns = json.loads(args.columns) if args.columns else None
    load = load_flickr30k if "flickr" in args.dataset.lower() else load_coco_captions
    data = load(args.dataset, split, image_dir=args.image_dir, columns=columns)
    return data.shuffle(seed=0).select(range(min(rows, len(data)))) if rows else data


def main():
    parser = HfArgumentParser((Arguments, PruningArguments, TrainingArguments), description=__doc__)
    parser.set_defaults(
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
        train, validation, test = (load_data(args, split) for split in ("train", "validation", "test"))
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
    texts = [caption for captions in test["captions"] for caption in captions]
    belongs = [index for index, captions in enumerate(test["captions"]) for _ in captions]
    own = [[text for text, image in enumerate(belongs) if image == index] for index in range(len(test))]
    encoded = processor.tokenizer(
        texts, padding=True, truncation=args.max_length is not None, max_length=args.max_length, return_tensors="pt"
    )
    images = DataLoader(
        test.select_columns("image"),
        batch_size=training_args.per_device_eval_batch_size,
        collate_fn=lambda rows: (
            processor.image_processor([row["image"].convert("RGB") for row in rows], return_tensors="pt").pixel_values
        ),
    )
    metric = load_metric("retrieval_recall")

    def score(image_to_text, text_to_image):
        recalls = metric.compute(
            predictions=image_to_text.numpy(), references=own, text_to_image=text_to_image.numpy()
        )
        return {f"{name.replace('_recall', '')} %": value for name, value in recalls.items()}

    def score_at(reduction):
        model.eval()
        model.set_pruning(reduction=reduction)
        started = time.perf_counter()
        scores = score_images_and_texts(model, images, encoded.input_ids, encoded.attention_mask, args.k)
        return score(*scores), time.perf_counter() - started

    before, _ = score_at(0.0)
    chance = torch.rand(len(test), len(texts), generator=torch.Generator().manual_seed(0))
    floor = score(chance, chance.T)

    # 4. Training; then every budget, from the one model. FLOPs are those of matching an image with one of its captions.
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

    # 5. What is saved is a whole checkpoint with its card, ready to publish: `AutoModel.from_pretrained(folder, trust_remote_code=True)`.
    if trainer.is_world_process_zero():
        shown = ("image_to_text@1 %", "text_to_image@1 %", "mean %")
        rows = [
            {
                "reduction asked": cost.reduction_asked,
                "reached": cost.reduction_reached,
                **{name: scores[name] for name in shown},
                "GFLOPs": cost.gflops,
                "time / dense": seconds / results[0][2],
            }
            for cost, scores, seconds in results
        ]
        title = f"{len(test)} images, {len(texts)} captions"
        report(
            title,
            rows,
            training_args.output_dir,
            metric="mean %",
            dense_before_training=before,
            floor=floor,
            dataset={
                "name": public_name(args.dataset) if args.dataset else "digit scenes",
                "split": "test",
                "example": texts[0],
            },
            settings=pruning_args.settings(args, trainer),
        )
        model.set_pruning(reduction=max(budgets))
        model.save_pretrained(training_args.output_dir)
        processor.save_pretrained(training_args.output_dir)
        write_model_card(training_args.output_dir, base_model=args.model, datasets=args.dataset)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
