"""Prune BLIP for image captioning: fine-tune it under pruning (or dense), evaluate it at several budgets, save it.

    python examples/run_captioning.py                                          # on the digit scenes
    python examples/run_captioning.py --dataset coco/ --model Salesforce/blip-image-captioning-base \\
        --output_dir outputs/captioning
    accelerate launch --num_processes 2 examples/run_captioning.py --per_device_train_batch_size 32

All options of `TrainingArguments` are accepted as well.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path

from script_arguments import DataArguments, PruningArguments, ScriptParser, save_run
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, set_seed

from madtp_hf import calibrate, create_optimizer
from madtp_hf.budgets.evaluation import budget_rows, evaluate_budgets
from madtp_hf.data import CaptioningCollator, load_coco_captions, load_digit_captions
from madtp_hf.metrics import load_metric


@dataclass
class Arguments(DataArguments):
    model: str = field(
        default=str(Path(__file__).parent / "blip-captioning-digits"),
        metadata={"help": "A dense BLIP for captioning, or a pruned model to continue with: a folder or Hub id."},
    )
    test_samples: int | None = field(default=1000, metadata={"help": "Images to evaluate on; 0 for all."})
    prompt: str = field(default="a picture of", metadata={"help": "The text before each caption."})
    num_beams: int = field(default=3, metadata={"help": "The number of beams."})
    max_new_tokens: int = field(default=30, metadata={"help": "The longest caption, in tokens."})
    metrics: list[str] = field(
        default_factory=lambda: ["bleu", "cider", "rouge"],
        metadata={"help": "Of bleu, cider, rouge, meteor and spice, the last two of which need Java."},
    )


def make_predict(model, processor, collator, args):
    """Return a function that captions a batch of images."""
    room = model.config.text_config.max_position_embeddings - collator.prompt_ids(1).shape[1]

    def predict(batch):
        written = model.generate(
            pixel_values=batch["pixel_values"],
            input_ids=collator.prompt_ids(len(batch["pixel_values"])),
            num_beams=args.num_beams,
            max_new_tokens=min(args.max_new_tokens, room),
        )
        captions = processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [caption.removeprefix(args.prompt).strip() for caption in captions]

    return predict


def score_captions(predictions, rows, metrics: tuple[str, ...]) -> dict[str, float]:
    scores = load_metric("caption_metrics").compute(
        predictions=predictions, references=rows["captions"], metrics=metrics
    )
    shown = {name: value for name, value in scores.items() if name not in ("bleu_1", "bleu_2", "bleu_3")}
    return {f"{name} %" if name == "bleu_4" else name: value for name, value in shown.items()}


def parse_arguments():
    parser = ScriptParser(
        (Arguments, PruningArguments, TrainingArguments),
        description=__doc__,
        output_dir="outputs/captioning",
        learning_rate=1e-4,
    )
    return parser.parse_args_into_dataclasses()


def main():
    args, pruning_args, training_args = parse_arguments()
    set_seed(training_args.seed)

    # 1. Load model and data.
    model, processor = pruning_args.load(args.model, "captioning")
    collator = CaptioningCollator(processor, model.config.text_config.bos_token_id, args.prompt, args.max_length)
    with training_args.main_process_first():
        train, validation, test = args.load(load_digit_captions, load_coco_captions)
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
    predict = make_predict(model, processor, collator, args)
    score = functools.partial(score_captions, metrics=tuple(args.metrics))
    test_batches, validation_shards = trainer.accelerator.prepare(test_batches, validation_batches)
    before = score(evaluate_budgets(model, test_batches, [0.0], predict, trainer.accelerator)[0].predictions, test)
    # The image-blind baseline: captions of other images.
    baseline = score([train[index % len(train)]["captions"][0] for index in range(len(test))], test)

    # 4. Train, then evaluate this one model at every budget.
    if training_args.do_train:
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        if not pruning_args.dense:
            calibrate(model, validation_batches, pruning_args.reductions)
    budgets = pruning_args.budgets(model)
    results = evaluate_budgets(model, test_batches, budgets, predict, trainer.accelerator)
    validated = evaluate_budgets(model, validation_shards, budgets, predict, trainer.accelerator)
    on_validation = {r.reduction_asked: score(r.predictions, validation)["bleu_4 %"] for r in validated}

    # 5. Save a complete checkpoint with its model card, ready to publish: `AutoModel.from_pretrained(folder,
    # trust_remote_code=True)`.
    if trainer.is_world_process_zero():
        save_run(
            model,
            processor,
            training_args.output_dir,
            f"{len(test)} images",
            budget_rows(results, [score(result.predictions, test) for result in results]),
            metric="bleu_4 %",
            validation=(len(validation), on_validation),
            dense_before_training=before,
            baseline=baseline,
            dataset=args.facts(args.prompt),
            settings=pruning_args.settings(args, trainer),
            base_model=args.model,
            datasets=args.dataset,
        )
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
