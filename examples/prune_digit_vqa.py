"""Prune a fine-tuned BLIP for visual question answering, on the digit scenes: the whole way, in one file.

Loads the dense checkpoint, fine-tunes it under pruning with the stock `Trainer`, calibrates, evaluates at several
budgets, saves, draws, and asks the saved checkpoint through a pipeline in a process of its own. For a BLIP of your
own, change the checkpoint and the data.

    python examples/prune_digit_vqa.py --output_dir outputs/demo
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoProcessor, Trainer, TrainingArguments, get_cosine_schedule_with_warmup, set_seed

from madtp_hf import (
    MadtpBlipForQuestionAnswering,
    ReductionCallback,
    calibrate,
    create_optimizer,
    init_alignment_from,
)
from madtp_hf.data import QuestionAnsweringCollator, load_digit_questions, question_only_accuracy
from madtp_hf.evaluation import evaluate_budgets, report
from madtp_hf.model_card import write_model_card
from madtp_hf.visualization import draw_surviving_patches


HERE = Path(__file__).parent


def evaluate(model, processor, dataset, collator, reductions, batch_size):
    """Accuracy, FLOPs and time at every reduction, relative to the first."""

    def predict(batch):
        written = model.generate(batch["input_ids"], batch["pixel_values"], batch["attention_mask"], max_new_tokens=3)
        return processor.tokenizer.batch_decode(written, skip_special_tokens=True)

    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collator)
    results = evaluate_budgets(model, loader, reductions, predict)
    return [
        {
            "reduction asked": result.reduction_asked,
            "reached": result.reduction_reached,
            "accuracy %": sum(map(str.__eq__, result.predictions, dataset["answer"])) / len(dataset),
            "GFLOPs": result.gflops,
            "time / dense": result.seconds / results[0].seconds,
        }
        for result in results
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "blip-vqa-digits"), help="dense BLIP: a folder or Hub id")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--train_questions", type=int, default=12800)
    parser.add_argument("--test_questions", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--target_reduction", type=float, nargs="+", default=[0.5, 0.8], help="one, or two: a range")
    parser.add_argument("--num_targets", type=int, default=3, help="how many targets in that range")
    parser.add_argument("--num_alignment_tokens", type=int, default=64)
    parser.add_argument("--alignment_dim", type=int, help="default: the width of the text encoder")
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.3, 0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    started = time.time()
    set_seed(args.seed)

    # 1. The dense model, with alignment tokens beside it.
    processor = AutoProcessor.from_pretrained(args.model)
    model = MadtpBlipForQuestionAnswering.from_blip(
        args.model, num_alignment_tokens=args.num_alignment_tokens, alignment_dim=args.alignment_dim
    )
    collator = QuestionAnsweringCollator(processor, model.config.text_config.bos_token_id)
    train = load_digit_questions("train", args.train_questions, args.seed)
    validation = load_digit_questions("validation", 512, args.seed)
    test = load_digit_questions("test", args.test_questions, args.seed)

    # 2. Pruned without any training: alignment tokens from what questions are made of, and which threshold saves how
    # much.
    init_alignment_from(model, DataLoader(train, batch_size=args.batch_size, collate_fn=collator))
    validation_batches = DataLoader(validation, batch_size=args.batch_size, collate_fn=collator)
    schedule = calibrate(model, validation_batches, args.reductions)
    untrained = evaluate(model, processor, test, collator, [0.0, schedule[-1][0]], args.batch_size)

    # 3. Fine-tune it under pruning: the callback steers the temperature. The alignment parameters learn slowly.
    optimizer = create_optimizer(model, args.learning_rate)
    steps = math.ceil(len(train) / args.batch_size)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    target = args.target_reduction[0] if len(args.target_reduction) == 1 else tuple(args.target_reduction)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output_dir / "trainer"),
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=1,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
            seed=args.seed,
        ),
        train_dataset=train,
        data_collator=collator,
        callbacks=[ReductionCallback(target, num_targets=args.num_targets)],
        optimizers=(optimizer, scheduler),
    )
    trainer.train()

    # 4. One checkpoint, every budget.
    schedule = calibrate(model, validation_batches, args.reductions)
    budgets = [0.0, *(entry[0] for entry in schedule)]
    results = evaluate(model, processor, test, collator, budgets, args.batch_size)
    floor = question_only_accuracy(train, test)
    checkpoint = args.output_dir / "checkpoint"
    not_of_training = ("model", "output_dir", "test_questions", "reductions")
    report(
        f"{len(test)} questions about unseen scans",
        results,
        checkpoint,
        metric="accuracy %",
        before_fine_tuning=untrained,
        floor=floor,
        seconds=round(time.time() - started),
        dataset={"name": "digit scenes", "split": "test", "example": test[0]["question"]},
        settings={
            "steps": trainer.state.global_step,
            **{name: value for name, value in vars(args).items() if name not in not_of_training},
        },
    )
    print(
        f"Before fine-tuning: dense {untrained[0]['accuracy %']:.1%}, at {untrained[-1]['reduction asked']} reduction"
        f" {untrained[-1]['accuracy %']:.1%}. From the words of the questions alone: {floor:.1%}."
    )

    # 5. What a user of the model loads, with its card, and a picture.
    model.set_pruning(reduction=budgets[-1])
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    write_model_card(checkpoint, base_model=args.model)
    scenes = [test[index] for index in range(3)]
    picture = draw_surviving_patches(
        model,
        processor,
        [row["image"] for row in scenes],
        [row["question"] for row in scenes],
        layers=[
            layer for layer in (1, 2, 3, 4, 6, 8, 10, 12) if layer <= model.config.vision_config.num_hidden_layers
        ],
    )
    picture.save(args.output_dir / "surviving_patches.png")

    # 6. Ask it, where this package can't be imported.
    for index, row in enumerate(scenes):
        row["image"].save(args.output_dir / f"scene_{index}.png")
    asked = [(str(args.output_dir / f"scene_{index}.png"), row["question"]) for index, row in enumerate(scenes)]
    subprocess.run(
        [sys.executable, str(HERE / "ask_checkpoint.py"), str(checkpoint), json.dumps(asked)],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    print("The scenes' own answers: " + ", ".join(row["answer"] for row in scenes))
    print(f"Wrote {checkpoint} and {args.output_dir / 'surviving_patches.png'} in {time.time() - started:.0f} s.")


if __name__ == "__main__":
    main()
