"""A strictly typed program that uses the public API in all the ways that users do. mypy checks it; it never runs.

The last function's mistakes have to be found: an unused `type: ignore` is an error here.
"""

from pathlib import Path

import torch
from transformers import BlipForQuestionAnswering, BlipProcessor, Trainer, TrainingArguments

from madtp_hf import (
    MadtpBlipConfig,
    MadtpBlipForConditionalGeneration,
    MadtpBlipForImagesAndTextClassification,
    MadtpBlipForImageTextRetrieval,
    MadtpBlipForQuestionAnswering,
    MadtpClipConfig,
    MadtpClipModel,
    ReductionCallback,
    RetrievalTrainer,
    calibrate,
    convert_original_checkpoint,
    count_flops,
    create_optimizer,
    init_alignment_from,
    last_checkpoint,
    push_checkpoint,
    push_folder,
)
from madtp_hf.budgets.evaluation import BudgetResult, evaluate_budgets
from madtp_hf.checkpoints.load import load
from madtp_hf.data.collators import QuestionAnsweringCollator
from madtp_hf.data.rows import load_table


def make_models(dense: BlipForQuestionAnswering) -> list[MadtpBlipForQuestionAnswering | MadtpClipModel]:
    from_model = MadtpBlipForQuestionAnswering.from_blip(dense, num_alignment_tokens=64)
    from_hub = MadtpBlipForQuestionAnswering.from_blip("Salesforce/blip-vqa-base", dtype=torch.float32)
    saved = MadtpBlipForQuestionAnswering.from_pretrained("checkpoint")
    clip = MadtpClipModel.from_clip(Path("clip"))
    by_config = MadtpBlipForQuestionAnswering(MadtpBlipConfig(pruning_method="tome", alignment_dim=None))
    captions: MadtpBlipForConditionalGeneration = MadtpBlipForConditionalGeneration.from_pretrained("checkpoint")
    pairs: MadtpBlipForImagesAndTextClassification = MadtpBlipForImagesAndTextClassification.from_blip("checkpoint")
    pairs.to("cuda").prepare_for_inference()
    captions.prepare_for_inference("int8").save_pretrained("prepared")
    return [from_model, from_hub, saved, clip, by_config, MadtpClipModel(MadtpClipConfig())]


def prune(model: MadtpBlipForQuestionAnswering, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    model.set_pruning(temperature=0.5)
    model.set_pruning(temperature=0.5, factor=0.9)
    model.set_pruning(reduction=0.5)
    model.set_pruning(None)
    model.set_pruning_method("evit")
    schedule: list[dict[str, float]] | None = model.config.pruning_schedule
    reductions: list[float] = model.config.calibrated_reductions
    print(schedule, reductions, model.is_pruning, model.pruning_method.fields, model.setting_for(0.5))
    with model.pruning(reduction=0.3) as pruned:
        answers = pruned.generate(input_ids, pixel_values, max_new_tokens=5)
    mask = torch.ones_like(input_ids)
    ranked = model.prepare_for_inference().rank_answers(input_ids, pixel_values, mask, answers, mask, k=8)
    print(model.as_pipeline(BlipProcessor.from_pretrained("checkpoint")))
    return ranked


def calibrate_and_train(model: MadtpBlipForQuestionAnswering, processor: BlipProcessor) -> list[BudgetResult]:
    table = load_table("questions.csv", "vqa", image_dir=Path("images"), columns={"question": "q"})
    collator = QuestionAnsweringCollator(processor, 30522, max_length=35)
    batches = [collator(list(table))]
    init_alignment_from(model, batches)
    schedule: list[dict[str, float]] = calibrate(model, batches, [0.3, 0.5], freeze=False)
    trainer = Trainer(
        model,
        TrainingArguments("out"),
        train_dataset=table,
        data_collator=collator,
        callbacks=[ReductionCallback(0.5), ReductionCallback((0.3, 0.7), num_targets=3, teacher=model)],
        optimizers=(create_optimizer(model, 1e-5), None),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint("out"))
    output = model(**batches[0])
    flops: torch.Tensor = count_flops(model.config, "vqa", output.vision_tokens, output.text_tokens, answer_tokens=3)
    print(schedule, flops.mean().item())
    return evaluate_budgets(model, batches, [0.0, 0.5], predict=lambda batch: list(batch["input_ids"]))


def convert_and_publish(processor: BlipProcessor) -> str:
    model = convert_original_checkpoint("model.pth", "retrieval", config=MadtpBlipConfig())
    assert isinstance(model, MadtpBlipForImageTextRetrieval)
    RetrievalTrainer(model, TrainingArguments("out"), queue_size=1024, distillation_warmup_steps=100)
    loaded = load("checkpoint", "vqa", device="cpu", precision="int8")
    loaded.model.set_pruning(reduction=0.5)
    push_folder("checkpoint", "me/blip-madtp", dry_run=True)
    return push_checkpoint(model, processor, "me/blip-madtp", metrics={0.5: {"accuracy": 0.9}}, private=True)


def mistakes(model: MadtpBlipForQuestionAnswering, processor: BlipProcessor, vision_tokens: torch.Tensor) -> None:
    model.set_pruning(0.5)  # type: ignore[arg-type]  # without the name of what it sets
    model.set_pruning(reduction="0.5")  # type: ignore[arg-type]
    model.set_pruning_method(3)  # type: ignore[arg-type]
    MadtpBlipForQuestionAnswering.from_blip(3)  # type: ignore[arg-type]
    ReductionCallback("0.5")  # type: ignore[arg-type]
    calibrate(model, [], 0.5)  # type: ignore[arg-type]
    count_flops(model, "vqa", vision_tokens)  # type: ignore[arg-type]
    push_checkpoint("checkpoint", processor, "me/blip-madtp")  # type: ignore[arg-type]
