"""Prune BLIP for visual reasoning over two images (NLVR2).

The script fine-tunes the model under pruning (or dense), evaluates it at several budgets, and saves it.

    python examples/run_nlvr2.py                                               # on the digit scenes
    python examples/run_nlvr2.py --dataset nlvr2/ --image_dir nlvr2/images --model blip-nlvr2 \\
        --output_dir outputs/nlvr2
    accelerate launch --num_processes 2 examples/run_nlvr2.py --per_device_train_batch_size 32

All options of `TrainingArguments` are accepted as well.
"""

from dataclasses import dataclass, field
from pathlib import Path

from script_arguments import DataArguments, PruningArguments, ScriptParser, save_run
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, set_seed

from madtp_hf import calibrate, create_optimizer
from madtp_hf.budgets.evaluation import budget_rows, evaluate_budgets
from madtp_hf.data import VisualReasoningCollator, load_digit_statements, load_nlvr2, question_only_accuracy
from madtp_hf.metrics import load_metric


@dataclass
class Arguments(DataArguments):
    model: str = field(
        default=str(Path(__file__).parent / "blip-nlvr2-digits"),
        metadata={
            "help": (
                "A dense BLIP for NLVR2, as `madtp-hf convert` writes it, a BLIP for retrieval or question answering"
                " to start from, or a pruned model to continue with: a folder or Hub id."
            )
        },
    )


def score(predictions, rows) -> dict[str, float]:
    known = {"identifiers": rows["identifier"]} if "identifier" in rows.column_names else {}
    scores = load_metric("nlvr2").compute(predictions=predictions, references=rows["label"], **known)
    return {f"{name} %": value for name, value in scores.items()}


def parse_arguments():
    parser = ScriptParser(
        (Arguments, PruningArguments, TrainingArguments),
        description=__doc__,
        output_dir="outputs/nlvr2",
        learning_rate=5e-5,
    )
    return parser.parse_args_into_dataclasses()


def main():
    args, pruning_args, training_args = parse_arguments()
    set_seed(training_args.seed)

    # 1. Load model and data.
    model, processor = pruning_args.load(args.model, "nlvr2")
    collator = VisualReasoningCollator(processor, args.max_length)
    with training_args.main_process_first():
        train, validation, test = args.load(load_digit_statements, load_nlvr2)
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
    def predict(batch):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return model(**inputs).logits.argmax(dim=-1).tolist()

    test_batches, validation_shards = trainer.accelerator.prepare(test_batches, validation_batches)
    before = score(evaluate_budgets(model, test_batches, [0.0], predict, trainer.accelerator)[0].predictions, test)
    baseline = {"accuracy %": question_only_accuracy(train, test, "sentence", "label")}  # language-only baseline

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
            f"{len(test)} statements",
            budget_rows(results, [score(result.predictions, test) for result in results]),
            metric="accuracy %",
            validation=(len(validation), on_validation),
            dense_before_training=before,
            baseline=baseline,
            dataset=args.facts(test[0]["sentence"]),
            settings=pruning_args.settings(args, trainer),
            base_model=args.model,
            datasets=args.dataset,
        )
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
