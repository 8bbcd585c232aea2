"""Compare LoRA with full fine-tuning under pruning, on the digit questions.

Both use the same data, number of steps and initial alignment tokens. The script writes the accuracy of both at the
trained reduction and with pruning off, the share of trained parameters, and the size of the saved files.

    python benchmarks/lora.py                                              # as in benchmarks/results/lora_digits.json
    python benchmarks/lora.py --split validation --train_questions 3200 --methods lora --rank 8 \\
        --output outputs/lora.json   # to choose settings
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoProcessor, Trainer, TrainingArguments, set_seed

from madtp_hf import MadtpBlipForQuestionAnswering, ReductionCallback, __version__, calibrate, create_optimizer
from madtp_hf.budgets.evaluation import evaluate_budgets
from madtp_hf.data import QuestionAnsweringCollator, load_digit_questions


ROOT = Path(__file__).parents[1]


def folder_bytes(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def run(method: str, args, processor, data: dict, collator) -> dict:
    """Fine-tune with one method, calibrate, evaluate, save; return the results."""
    set_seed(args.seed)  # both methods start with the same new alignment tokens
    model = MadtpBlipForQuestionAnswering.from_blip(args.model, num_alignment_tokens=256, alignment_dim=24)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    learning_rate = args.learning_rate
    if method == "lora":
        learning_rate = args.lora_learning_rate
        target = args.target_modules[0] if args.target_modules == ["all-linear"] else args.target_modules
        config = LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=target, modules_to_save=["alignment"])
        model = get_peft_model(model, config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    batches = {
        split: DataLoader(data[split], args.batch_size, collate_fn=collator) for split in ("calibration", "evaluation")
    }
    calibrate(model, batches["calibration"], [args.reduction])  # gives the callback its starting point
    started = time.process_time()
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=args.batch_size,
                num_train_epochs=1,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                logging_steps=20,
                save_strategy="no",
                report_to="none",
                remove_unused_columns=False,
                use_cpu=not torch.cuda.is_available(),
                seed=args.seed,
            ),
            train_dataset=data["train"],
            data_collator=collator,
            callbacks=[ReductionCallback(args.reduction)],
            optimizers=(create_optimizer(model, learning_rate), None),
        )
        trainer.train()
    seconds = time.process_time() - started
    calibrate(model, batches["calibration"], [args.reduction])

    def predict(batch):
        written = model.generate(
            input_ids=batch["input_ids"],
            pixel_values=batch["pixel_values"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=3,
        )
        return processor.tokenizer.batch_decode(written, skip_special_tokens=True)

    results = evaluate_budgets(model, batches["evaluation"], [0.0, args.reduction], predict)
    answers = data["evaluation"]["answer"]
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if method == "lora":
            model.config.save_pretrained(Path(folder) / "pruning")
        saved = folder_bytes(folder)
    return {
        "method": method,
        "learning rate": learning_rate,
        "steps": trainer.state.global_step,
        "trained parameters": trained,
        "trained share": trained / parameters,
        "saved bytes": saved,
        "training CPU seconds": round(seconds, 1),
        "results": [
            {
                "reduction asked": result.reduction_asked,
                "reached": result.reduction_reached,
                "accuracy": sum(map(str.__eq__, result.predictions, answers)) / len(answers),
                "GFLOPs": result.gflops,
            }
            for result in results
        ],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(ROOT / "examples" / "blip-vqa-digits"), help="dense BLIP: a folder or Hub id"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "lora_digits.json")
    parser.add_argument("--methods", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="what to evaluate on")
    parser.add_argument("--train_questions", type=int, default=12800)
    parser.add_argument("--evaluation_questions", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--reduction", type=float, default=0.5)
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="of full fine-tuning")
    parser.add_argument("--lora_learning_rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--alpha", type=int, default=8)
    parser.add_argument("--target_modules", nargs="+", default=["all-linear"], help="names, or all-linear")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    processor = AutoProcessor.from_pretrained(args.model)
    start_token = MadtpBlipForQuestionAnswering.config_class.from_pretrained(args.model).text_config.bos_token_id
    collator = QuestionAnsweringCollator(processor, start_token)
    data = {
        "train": load_digit_questions("train", args.train_questions, args.seed),
        # Not the evaluation data, even when settings are chosen on the validation split.
        "calibration": load_digit_questions("validation", 512, args.seed),
        "evaluation": load_digit_questions(args.split, args.evaluation_questions, args.seed + (args.split != "test")),
    }
    content = {
        "title": (
            f"LoRA and full fine-tuning at {args.reduction} reduction, {args.evaluation_questions} {args.split}"
            " questions"
        ),
        "settings": {name: value for name, value in vars(args).items() if name not in ("model", "output", "methods")},
        "runs": [],
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "madtp_hf": __version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    for method in args.methods:
        result = run(method, args, processor, data, collator)
        content["runs"].append(result)
        print(json.dumps(result))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
