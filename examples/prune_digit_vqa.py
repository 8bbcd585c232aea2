"""Prune a fine-tuned BLIP for visual question answering on the digit scenes: the whole workflow in one file.

Loads the dense checkpoint, fine-tunes it under pruning with the standard `Trainer`, calibrates, evaluates at several
budgets, saves, draws, and asks the saved checkpoint through a pipeline in a separate process. For a BLIP of your own,
change the checkpoint and the data.

    python examples/prune_digit_vqa.py --output_dir outputs/demo
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from script_arguments import save_run
from torch.utils.data import DataLoader
from transformers import (
    AutoProcessor,
    BlipConfig,
    BlipForQuestionAnswering,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from madtp_hf import (
    MadtpBlipForQuestionAnswering,
    ReductionCallback,
    calibrate,
    create_optimizer,
    init_alignment_from,
)
from madtp_hf.budgets.benchmark import benchmark
from madtp_hf.budgets.evaluation import budget_rows, evaluate_budgets, report
from madtp_hf.data import QuestionAnsweringCollator, load_digit_questions, question_only_accuracy
from madtp_hf.serving.visualization import draw_surviving_patches
from madtp_hf.tasks import make_batches


HERE = Path(__file__).parent


def evaluate(model, processor, dataset, collator, reductions, batch_size):
    """Return accuracy, FLOPs and time at every reduction, relative to the first."""

    def predict(batch):
        written = model.generate(batch["input_ids"], batch["pixel_values"], batch["attention_mask"], max_new_tokens=3)
        return processor.tokenizer.batch_decode(written, skip_special_tokens=True)

    def accuracy(predictions):
        return {"accuracy %": sum(map(str.__eq__, predictions, dataset["answer"])) / len(dataset)}

    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collator)
    results = evaluate_budgets(model, loader, reductions, predict)
    return budget_rows(results, [accuracy(result.predictions) for result in results])


def fine_tune(model, dataset, collator, args) -> int:
    """Train under pruning for one epoch; return the number of steps."""
    # The callback controls the temperature; the alignment parameters learn slowly.
    target = args.target_reduction[0] if len(args.target_reduction) == 1 else tuple(args.target_reduction)
    optimizer = create_optimizer(model, args.learning_rate)
    steps = math.ceil(len(dataset) / args.batch_size)
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
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=args.seed,
        ),
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[ReductionCallback(target, num_targets=args.num_targets)],
        optimizers=(optimizer, get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)),
    )
    trainer.train()
    return trainer.state.global_step


def draw_and_ask(model, processor, scenes, folder) -> None:
    """Draw the patches that survive, and ask the saved checkpoint in a process that can't import this package."""
    layers = [layer for layer in (1, 2, 3, 4, 6, 8, 10, 12) if layer <= model.config.vision_config.num_hidden_layers]
    images, questions = [row["image"] for row in scenes], [row["question"] for row in scenes]
    draw_surviving_patches(model, processor, images, questions, layers=layers).save(folder / "surviving_patches.png")
    asked = []
    for index, row in enumerate(scenes):
        row["image"].save(folder / f"scene_{index}.png")
        asked.append((str(folder / f"scene_{index}.png"), row["question"]))
    subprocess.run(
        [sys.executable, str(HERE / "ask_checkpoint.py"), str(folder / "checkpoint"), json.dumps(asked)],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    print("The scenes' own answers: " + ", ".join(row["answer"] for row in scenes))


def time_at_base_size(processor, scenes: list[dict], reductions: list[float], folder) -> None:
    """Time a BLIP of the published size on this machine, at the same budgets; its weights are random.

    The digit model is so small that choosing tokens costs as much as it saves; this is the size that people have.
    """
    config = BlipConfig(
        text_config={"num_attention_heads": 12}, vision_config={"image_size": 384, "initializer_range": 0.02}
    )
    model = MadtpBlipForQuestionAnswering.from_blip(BlipForQuestionAnswering(config)).eval().prepare_for_inference()
    processor.image_processor.size = {"height": 384, "width": 384}
    batches = make_batches(model, processor, scenes, len(scenes))
    init_alignment_from(model, batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one scene is few, but it is the one that is timed
        calibrate(model, batches, reductions)
    rows = benchmark(model, processor, scenes, batch_sizes=[1])
    rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
    report("Time on this machine at the size of BLIP-base, with random weights", rows, folder)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "blip-vqa-digits"), help="A dense BLIP: a folder or Hub id.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--train_questions", type=int, default=9600)
    parser.add_argument("--test_questions", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument(
        "--target_reduction", type=float, nargs="+", default=[0.5, 0.8], help="Target reduction, or two for a range."
    )
    parser.add_argument("--num_targets", type=int, default=5, help="The number of targets in that range.")
    parser.add_argument("--num_alignment_tokens", type=int, default=100)
    parser.add_argument("--alignment_dim", type=int, help="Default: the width of the text encoder.")
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.3, 0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no_timing", action="store_true", help="Don't time a BLIP of the published size at the end.")
    return parser.parse_args()


def main():
    args = parse_arguments()
    started = time.time()
    set_seed(args.seed)

    # 1. Load the dense model with new alignment tokens.
    processor = AutoProcessor.from_pretrained(args.model)
    model = MadtpBlipForQuestionAnswering.from_blip(
        args.model, num_alignment_tokens=args.num_alignment_tokens, alignment_dim=args.alignment_dim
    )
    collator = QuestionAnsweringCollator(processor, model.config.text_config.bos_token_id)
    train = load_digit_questions("train", args.train_questions, args.seed)
    validation = load_digit_questions("validation", 1024, args.seed)
    test = load_digit_questions("test", args.test_questions, args.seed)

    # 2. Prune without training: initialise the alignment tokens from training questions, and calibrate the thresholds.
    init_alignment_from(model, DataLoader(train, batch_size=args.batch_size, collate_fn=collator))
    # Half is enough for thresholds; telling a point of accuracy apart, below, takes all.
    calibrated_on = validation.select(range(512))
    validation_batches = DataLoader(calibrated_on, batch_size=args.batch_size, collate_fn=collator)
    calibrate(model, validation_batches, args.reductions)
    largest = model.config.calibrated_reductions[-1]
    untrained = evaluate(model, processor, test, collator, [0.0, largest], args.batch_size)

    # 3. Fine-tune under pruning.
    steps = fine_tune(model, train, collator, args)

    # 4. Evaluate one checkpoint at every budget. It is saved at the largest budget that costs at most one point on
    # validation data.
    calibrate(model, validation_batches, args.reductions)
    budgets = [0.0, *model.config.calibrated_reductions]
    results = evaluate(model, processor, test, collator, budgets, args.batch_size)
    on_validation = evaluate(model, processor, validation, collator, budgets, args.batch_size)
    baseline = question_only_accuracy(train, test)
    not_of_training = ("model", "output_dir", "test_questions", "reductions")
    save_run(
        model,
        processor,
        args.output_dir / "checkpoint",
        f"{len(test)} questions about unseen scans",
        results,
        metric="accuracy %",
        validation=(len(validation), {row["reduction asked"]: row["accuracy %"] for row in on_validation}),
        before_fine_tuning=untrained,
        baseline={"accuracy %": baseline},
        seconds=round(time.time() - started),
        dataset={"name": "digit scenes", "split": "test", "example": test[0]["question"]},
        settings={
            "steps": steps,
            "training data": "digit scenes",
            **{name: value for name, value in vars(args).items() if name not in not_of_training},
        },
        base_model=args.model,
    )
    print(
        f"Before fine-tuning: dense {untrained[0]['accuracy %']:.1%}, at {untrained[-1]['reduction asked']} reduction"
        f" {untrained[-1]['accuracy %']:.1%}. From the words of the questions alone: {baseline:.1%}."
    )

    # 5. Draw what the model looks at, and ask it through a pipeline.
    model.set_pruning(reduction=budgets[-1])
    draw_and_ask(model, processor, [test[index] for index in range(3)], args.output_dir)

    # 6. Time the budgets at the size of the published BLIP.
    if not args.no_timing:
        time_at_base_size(processor, [test[0]], [0.5, 0.8], args.output_dir / "base_size")
    print(f"Wrote {args.output_dir / 'surviving_patches.png'}; {time.time() - started:.0f} s in all.")


if __name__ == "__main__":
    main()
