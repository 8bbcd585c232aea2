"""Prune BLIP for visual question answering.

The script fine-tunes the model under pruning (or dense), evaluates it at several budgets, and saves it.

    python examples/run_vqa.py                                                 # on the digit scenes
    python examples/run_vqa.py --dataset vqav2/ --image_dir coco/ --model Salesforce/blip-vqa-base \\
        --test_split validation --output_dir outputs/vqa
    accelerate launch --num_processes 2 examples/run_vqa.py --per_device_train_batch_size 32

VQAv2's test split has no answers. All options of `TrainingArguments` are accepted as well.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from script_arguments import DataArguments, PruningArguments, ScriptParser, save_run
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, set_seed

from madtp_hf import calibrate, create_optimizer
from madtp_hf.budgets.evaluation import budget_rows, evaluate_budgets
from madtp_hf.data import QuestionAnsweringCollator, load_digit_questions, load_vqav2, question_only_accuracy
from madtp_hf.metrics import load_metric


@dataclass
class Arguments(DataArguments):
    model: str = field(
        default=str(Path(__file__).parent / "blip-vqa-digits"),
        metadata={
            "help": "A dense BLIP for question answering, or a pruned model to continue with: a folder or Hub id."
        },
    )
    answer_list: str | None = field(
        default=None,
        metadata={
            "help": (
                "A JSON list of answers to choose from, as BLIP evaluates VQAv2; without it, answers are generated."
            )
        },
    )


def make_predict(model, processor, answers: list[str] | None):
    """Return a function that answers a batch of questions: it ranks `answers` or, without them, generates."""
    if answers:
        candidates = processor.tokenizer(answers, padding=True, return_tensors="pt").to(model.device)

    def predict(batch):
        inputs = [batch["input_ids"], batch["pixel_values"], batch["attention_mask"]]
        if answers:
            chosen = model.rank_answers(*inputs, candidates.input_ids, candidates.attention_mask)
            return [answers[index] for index in chosen.tolist()]
        written = model.generate(*inputs, max_new_tokens=10)
        return processor.tokenizer.batch_decode(written, skip_special_tokens=True)

    return predict


def score(predictions, rows) -> dict[str, float]:
    # A digit scene has one answer: treat it as the answer of all ten annotators.
    references = rows["answers"] if "answers" in rows.column_names else [[answer] * 10 for answer in rows["answer"]]
    return {
        "accuracy %": load_metric("vqa_accuracy").compute(predictions=predictions, references=references)["accuracy"]
    }


def parse_arguments():
    parser = ScriptParser(
        (Arguments, PruningArguments, TrainingArguments),
        description=__doc__,
        output_dir="outputs/vqa",
        learning_rate=2e-5,
    )
    return parser.parse_args_into_dataclasses()


def main():
    args, pruning_args, training_args = parse_arguments()
    set_seed(training_args.seed)

    # 1. Load model and data.
    model, processor = pruning_args.load(args.model, "vqa")
    collator = QuestionAnsweringCollator(processor, model.config.text_config.bos_token_id, args.max_length)
    with training_args.main_process_first():
        train, validation, test = args.load(load_digit_questions, load_vqav2)
    train_batches, validation_batches, test_batches = (
        DataLoader(rows, batch_size=training_args.per_device_eval_batch_size, collate_fn=collator)
        for rows in (train, validation, test)
    )

    # 2. Set up fine-tuning. Under pruning, the callback controls the temperature, starting from the calibrated one.
    pruning_args.prepare(model, train_batches, validation_batches, training_args)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train,
        data_collator=collator,
        callbacks=pruning_args.callbacks(),
        optimizers=(
            create_optimizer(model, training_args.learning_rate, weight_decay=training_args.weight_decay),
            None,
        ),
    )
    # 3. Define predictions and their score before training.
    answers = json.loads(Path(args.answer_list).read_text()) if args.answer_list else None
    predict = make_predict(model, processor, answers)
    test_batches, validation_shards = trainer.accelerator.prepare(test_batches, validation_batches)
    before = score(evaluate_budgets(model, test_batches, [0.0], predict, trainer.accelerator)[0].predictions, test)
    # Language-only baseline.
    baseline = None if args.dataset else {"accuracy %": question_only_accuracy(train, test)}

    # 4. Train, then evaluate this one model at every budget.
    if training_args.do_train:
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        if not pruning_args.dense:
            calibrate(model, validation_batches, pruning_args.reductions)
    budgets = pruning_args.budgets(model)
    results = evaluate_budgets(model, test_batches, budgets, predict, trainer.accelerator)
    validated = evaluate_budgets(model, validation_shards, budgets, predict, trainer.accelerator)
    on_validation = {r.reduction_asked: score(r.predictions, validation)["accuracy %"] for r in validated}

    # 5. Save a complete checkpoint with its model card, ready to publish: `AutoModel.from_pretrained(folder,
    # trust_remote_code=True)`.
    if trainer.is_world_process_zero():
        save_run(
            model,
            processor,
            training_args.output_dir,
            f"{len(test)} questions",
            budget_rows(results, [score(result.predictions, test) for result in results]),
            metric="accuracy %",
            validation=(len(validation), on_validation),
            dense_before_training=before,
            baseline=baseline,
            dataset=args.facts(test[0]["question"]),
            settings=pruning_args.settings(args, trainer),
            base_model=args.model,
            datasets=args.dataset,
        )
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
