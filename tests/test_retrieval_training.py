"""Retrieval: the trainer with its memory, the scores of shortlists; and what a model does at several budgets."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BlipForImageTextRetrieval, TrainerCallback, TrainingArguments

from madtp_hf import (
    MadtpBlipForImageTextRetrieval,
    MadtpBlipForQuestionAnswering,
    ReductionCallback,
    RetrievalTrainer,
    calibrate,
    create_optimizer,
)
from madtp_hf.budgets.evaluation import evaluate_budgets, report
from madtp_hf.budgets.passes import measure
from madtp_hf.modeling.retrieval_loss import contrastive_loss
from madtp_hf.tasks.retrieval import NOT_LISTED, score_images_and_texts
from madtp_hf.training.retrieval_trainer import MEMORY_FILE, ContrastiveMemory

from .conftest import TASKS, blip_config, make_inputs, make_task_model


def make_retrieval(**overrides) -> MadtpBlipForImageTextRetrieval:
    torch.manual_seed(1)
    blip = BlipForImageTextRetrieval(blip_config(image_text_hidden_size=16)).eval()
    return MadtpBlipForImageTextRetrieval.from_blip(blip, num_alignment_tokens=12, **overrides)


@pytest.fixture
def model():
    return make_retrieval()


def pairs(count, seed=3, lengths=None):
    """Images and texts; those in the same place belong together, and two in a row are of one image."""
    inputs = make_inputs(lengths or (8,) * count, seed)
    inputs.pop("labels")
    return {**inputs, "image_ids": torch.arange(count) // 2}


def collate(rows):
    return {**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}, "return_loss": True}


def as_rows(inputs):
    return [{name: value[index] for name, value in inputs.items()} for index in range(len(inputs["image_ids"]))]


def make_trainer(model, folder, callbacks=(), trainer_class=RetrievalTrainer, rows=None, **settings):
    names = ("queue_size", "momentum", "distillation", "distillation_warmup_steps", "optimizers")
    options = {"queue_size": 12, "momentum": 0.8, **{name: settings.pop(name) for name in names if name in settings}}
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return trainer_class(
        model=model,
        args=TrainingArguments(**{**defaults, **settings}),
        train_dataset=rows or as_rows(pairs(24)),
        data_collator=collate,
        callbacks=list(callbacks),
        **options,
    )


class Watch(TrainerCallback):
    """Notes what `look()` gives at the beginning of every step, before the optimizer moves and at its end."""

    def __init__(self):
        self.look, self.begun, self.before, self.ended = None, [], [], []

    def on_step_begin(self, *args, **kwargs):
        self.begun.append(self.look())

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.before.append(self.look())

    def on_step_end(self, *args, **kwargs):
        self.ended.append(self.look())


# The memory


def test_the_twin_is_a_moving_average_of_the_model(model, tmp_path):
    watch = Watch()
    trainer = make_trainer(model, tmp_path, [watch], gradient_accumulation_steps=2, learning_rate=1e-2)
    watch.look = lambda: {name: value.detach().clone() for name, value in model.named_parameters()}
    expected = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer.train()
    # Once a step, however many batches it accumulates.
    for weights in watch.begun:
        expected = {name: 0.8 * expected[name] + 0.2 * weights[name] for name in expected}
    twin = dict(trainer.memory.momentum_encoder.named_parameters())
    assert len(watch.begun) == 4 and twin.keys() == expected.keys()
    for name, value in twin.items():
        torch.testing.assert_close(value, expected[name])
        assert not value.requires_grad
    assert not torch.allclose(twin["vision_proj.weight"], model.vision_proj.weight, atol=1e-4)
    assert not trainer.memory.momentum_encoder.training


@pytest.mark.parametrize("size", (0, 1, 5, 7, 100))
def test_the_queue_holds_the_latest(model, size):
    memory = ContrastiveMemory(model, queue_size=size)
    features = torch.randn(23, 16)
    start = 0
    for count in (4, 4, 3, 5, 6, 1):  # some batches wrap around, some are longer than the queue
        rows = slice(start, start + count)
        memory._enqueue(features[rows], -features[rows], torch.arange(start, start + count))
        start += count
        held = memory.id_queue[memory.id_queue >= 0]
        assert sorted(held.tolist()) == list(range(max(0, start - size), start))
        filled = memory.id_queue >= 0
        assert torch.equal(memory.image_queue[filled], features[held])
        assert torch.equal(memory.text_queue[filled], -features[held])


def test_a_place_in_the_queue_is_written_in_turn(model):
    memory = ContrastiveMemory(model, queue_size=6)
    for ids in ([1, 2, 3, 4], [5, 6, 7, 8], [9, 10]):
        memory._enqueue(torch.zeros(len(ids), 16), torch.zeros(len(ids), 16), torch.tensor(ids))
    assert memory.id_queue.tolist() == [7, 8, 9, 10, 5, 6] and int(memory.position) == 4


def softmax(values):
    weights = np.exp(values - values.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", (0.0, 1.5))
@pytest.mark.parametrize("progress", (0.0, 0.5, 1.0))
def test_targets_and_loss_are_those_computed_by_hand(model, progress, temperature):
    model.set_pruning(temperature=temperature)
    memory = ContrastiveMemory(model, queue_size=7, momentum=0.5, distillation=0.4)
    with torch.no_grad():  # the model moves on, the twin follows half the way
        for parameter in model.parameters():
            parameter.mul_(1.1)
    memory.follow(model)
    halfway = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in halfway.parameters():
            parameter.mul_(1.05 / 1.1)
    queued_images, queued_texts = (torch.nn.functional.normalize(torch.randn(3, 16), dim=1) for _ in range(2))
    memory._enqueue(queued_images, queued_texts, torch.tensor([9, 5, 0]))
    inputs = pairs(4, lengths=(8, 5, 8, 3))
    inputs["image_ids"] = torch.tensor(
        [5, 6, 5, 7]
    )  # 5 is twice in the batch and once in the queue, 6 and 7 are alone
    keys = memory(inputs, progress)
    output = model(**inputs, return_loss=True, contrastive_keys=keys)

    with torch.no_grad():
        twin_images = halfway.get_image_features(inputs["pixel_values"]).pooler_output.numpy()
        twin_texts = halfway.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output.numpy()
        images = model.get_image_features(inputs["pixel_values"]).pooler_output.numpy()
        texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output.numpy()
    image_keys = np.concatenate([twin_images, queued_images.numpy()])
    text_keys = np.concatenate([twin_texts, queued_texts.numpy()])
    hard = np.zeros((4, 7))
    hard[[0, 0, 0, 2, 2, 2], [0, 2, 5] * 2] = 1 / 3
    hard[1, 1] = hard[3, 3] = 1
    share = 0.4 * progress
    image_targets = share * softmax(twin_images @ text_keys.T / 0.07) + (1 - share) * hard
    text_targets = share * softmax(twin_texts @ image_keys.T / 0.07) + (1 - share) * hard
    loss = -np.mean(
        [
            (image_targets * np.log(softmax(images @ text_keys.T / 0.07))).sum(axis=1),
            (text_targets * np.log(softmax(texts @ image_keys.T / 0.07))).sum(axis=1),
        ]
    )
    np.testing.assert_allclose(keys.image, image_keys, atol=1e-5)
    np.testing.assert_allclose(keys.text, text_keys, atol=1e-5)
    np.testing.assert_allclose(keys.image_targets, image_targets, atol=1e-4)
    np.testing.assert_allclose(keys.text_targets, text_targets, atol=1e-4)
    assert output.contrastive_loss.item() == pytest.approx(loss, rel=1e-4)
    assert keys.temperature is memory.temperature and not keys.image_targets.requires_grad
    assert memory.id_queue.tolist() == [9, 5, 0, 5, 6, 5, 7]


def test_without_a_memory_the_batch_is_contrasted_with_itself(model):
    inputs = pairs(4)
    inputs["image_ids"] = torch.tensor([5, 6, 5, 7])
    images = model.get_image_features(inputs["pixel_values"]).pooler_output
    texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    similarity = (images @ texts.T).detach().numpy() / 0.07
    targets = np.array([[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1]])
    loss = -np.mean([(targets * np.log(softmax(s))).sum(axis=1) for s in (similarity, similarity.T)])
    assert contrastive_loss(images, texts, inputs["image_ids"], None).item() == pytest.approx(loss, rel=1e-4)


def test_the_twin_prunes_as_the_model_does(model):
    memory = ContrastiveMemory(model, queue_size=0)
    model.set_pruning(temperature=1.5)
    memory.follow(model)
    inputs = pairs(4)
    keys = memory(inputs, 0.0)
    torch.testing.assert_close(keys.image, model.get_image_features(inputs["pixel_values"]).pooler_output.detach())
    model.set_pruning(None)
    assert not torch.allclose(keys.image, model.get_image_features(inputs["pixel_values"]).pooler_output, atol=1e-3)
    assert len(memory.id_queue) == 0 and keys.image_targets.shape == (4, 4)


@pytest.mark.parametrize(
    "options", ({"queue_size": -1}, {"momentum": 1.0}, {"momentum": -0.1}, {"distillation": 1.1}), ids=str
)
def test_bad_settings_are_named(model, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ContrastiveMemory(model, **{"queue_size": 4, **options})


# The trainer


def test_distillation_fades_in(model, tmp_path):
    for settings, expected in (
        ({"distillation_warmup_steps": 2, "max_steps": 4}, [0, 0.5, 1, 1]),
        ({"distillation_warmup_steps": 0, "max_steps": 2}, [0, 1]),
        # Over two epochs of 3 steps; of one there is but half.
        ({"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 8}, [0, 1 / 6, 2 / 6]),
        (
            {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 8},
            [n / 6 for n in range(6)] + [1] * 3,
        ),
    ):
        watch = Watch()
        trainer = make_trainer(copy.deepcopy(model), tmp_path, [watch], **settings)
        watch.look = trainer._distillation_progress
        trainer.train()
        assert watch.begun == pytest.approx(expected)


class TemperatureGradients(RetrievalTrainer):
    """Computes the gradient of the learned temperature by itself."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.gradients = [
            *getattr(self, "gradients", []),
            torch.autograd.grad(loss, self.memory.temperature, retain_graph=True)[0],
        ]
        return loss


@pytest.mark.parametrize("accumulated", (1, 2))
@pytest.mark.parametrize("given", (True, False))
def test_the_temperature_is_learned(model, given, accumulated, tmp_path):
    optimizer = create_optimizer(model, 1e-3, weight_decay=0.1)
    watch = Watch()
    trainer = make_trainer(
        model,
        tmp_path,
        [watch],
        TemperatureGradients,
        optimizers=(optimizer if given else None, None),
        gradient_accumulation_steps=accumulated,
        weight_decay=0.1,
        lr_scheduler_type="linear",
    )
    memory = trainer.memory
    watch.look = lambda: None if memory.temperature.grad is None else memory.temperature.grad.item()
    trainer.train()
    # A step's gradient is that of its batches, with nothing left over from the steps before.
    expected = torch.stack(trainer.gradients).view(4, accumulated).mean(dim=1)
    assert watch.before == pytest.approx(expected.tolist(), rel=1e-4)
    groups = [
        group for group in trainer.optimizer.param_groups if any(p is memory.temperature for p in group["params"])
    ]
    assert len(groups) == 1 and len(groups[0]["params"]) == 1 and groups[0]["weight_decay"] == 0
    assert groups[0]["initial_lr"] == 1e-3 and groups[0]["lr"] == 0  # the schedule is the model's, and has ended
    assert memory.temperature.item() != pytest.approx(0.07, abs=1e-4)


@pytest.mark.parametrize(("value", "kept"), ((0.9, 0.5), (1e-6, 0.001)))
def test_the_temperature_stays_in_bounds(model, value, kept):
    memory = ContrastiveMemory(model, queue_size=4)
    memory.temperature.data.fill_(value)
    assert memory(pairs(4), 0.5).temperature.item() == pytest.approx(kept)
    assert memory.temperature.requires_grad


def test_a_schedule_that_does_not_know_the_temperature_is_refused(model, tmp_path):
    optimizer = create_optimizer(model, 1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match=r"optimizers=\(optimizer, None\)"):
        make_trainer(model, tmp_path, optimizers=(optimizer, schedule))


def test_another_model_is_refused(tmp_path, blip):
    answering = MadtpBlipForQuestionAnswering.from_blip(blip, num_alignment_tokens=12)
    with pytest.raises(TypeError, match="MadtpBlipForQuestionAnswering: expected a MadtpBlipForImageTextRetrieval"):
        make_trainer(answering, tmp_path)


def test_a_model_made_anew_by_each_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model_init"):
        RetrievalTrainer(
            model_init=lambda: make_retrieval(), args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        )


class Measured(ReductionCallback):
    """How often a step was measured; under a name of its own it would not be found in a checkpoint."""

    def on_step_end(self, *args, **kwargs):
        self.counts = [*getattr(self, "counts", []), len(self._measured)]
        super().on_step_end(*args, **kwargs)


@pytest.mark.parametrize("queue_size", (pytest.param(0, marks=pytest.mark.slow), 12))
def test_it_learns_under_pruning(model, queue_size, tmp_path):
    """The few pairs there are become each other's nearest, while the callback holds the model at its reduction."""
    inputs = pairs(8)
    inputs["image_ids"] = torch.arange(8)
    callback = Measured(0.4)
    trainer = make_trainer(
        model,
        tmp_path,
        [callback],
        rows=as_rows(inputs),
        max_steps=50,
        per_device_train_batch_size=8,
        queue_size=queue_size,
        optimizers=(create_optimizer(model, 2e-3), None),
    )
    trainer.train()
    assert set(callback.counts) == {1}  # the twin's passes are not measured
    reductions = [entry["reduction"] for entry in trainer.state.log_history if "reduction" in entry]
    assert sum(reductions[-20:]) / 20 == pytest.approx(0.4, abs=0.03)
    model.eval()
    with torch.no_grad():
        similarity = model(**inputs, use_itm_head=False).itm_score
    assert (similarity.argmax(dim=1) == torch.arange(8)).float().mean() >= 0.75
    # What is saved is the plain model.
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / MEMORY_FILE).exists()
    plain = make_retrieval()
    plain.save_pretrained(tmp_path / "plain")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == load_file(tmp_path / "plain" / "model.safetensors").keys()
    assert not model._forward_hooks


def test_resumed_training_ends_where_uninterrupted_does(tmp_path):
    settings = {
        "max_steps": 7,  # 3 steps an epoch
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "restore_callback_states_from_checkpoint": True,
        "lr_scheduler_type": "linear",
    }
    whole_model, resumed_model = make_retrieval(), make_retrieval()
    whole = make_trainer(
        whole_model,
        tmp_path / "whole",
        [ReductionCallback((0.3, 0.5), num_targets=2)],
        **settings,
        save_strategy="steps",
        save_steps=4,
    )
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert (checkpoint / MEMORY_FILE).exists()
    torch.manual_seed(7)
    resumed = make_trainer(
        resumed_model, tmp_path / "resumed", [ReductionCallback((0.3, 0.5), num_targets=2)], **settings
    )
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == whole.state.global_step == 7
    for ours, theirs in ((whole_model, resumed_model), (whole.memory, resumed.memory)):
        ours, theirs = ours.state_dict(), theirs.state_dict()
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(
                theirs[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert whole_model.config.pruning_temperature == resumed_model.config.pruning_temperature
    # The checkpoint's model is the plain one, too.
    MadtpBlipForImageTextRetrieval.from_pretrained(checkpoint)
    assert load_file(checkpoint / "model.safetensors").keys() == whole_model.state_dict().keys()


def test_a_batch_accumulated_is_a_batch_of_the_queue(model, tmp_path):
    trainer = make_trainer(
        model, tmp_path, gradient_accumulation_steps=3, max_steps=1, train_sampling_strategy="sequential"
    )
    trainer.train()
    assert trainer.memory.id_queue.tolist() == (torch.arange(12) // 2).tolist()


@pytest.mark.parametrize("mixed", (True, False))
def test_it_trains_in_bfloat16(model, mixed, tmp_path):
    if not mixed:
        model.to(torch.bfloat16)
    trainer = make_trainer(model, tmp_path, [ReductionCallback(0.4)], bf16=mixed, max_steps=2)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    assert {tensor.dtype for tensor in trainer.memory.state_dict().values()} == {torch.float32, torch.long}


def test_evaluation_leaves_the_memory_alone(model, tmp_path):
    trainer = make_trainer(model, tmp_path, max_steps=1)
    trainer.train()
    before = copy.deepcopy(trainer.memory.state_dict())
    assert math.isfinite(trainer.evaluate(as_rows(pairs(8, seed=4)))["eval_loss"])
    for name, value in trainer.memory.state_dict().items():
        assert torch.equal(value, before[name])


# Scores of shortlists


def score_all(model, inputs):
    """Every image with every text, one pair at a time."""
    images = [model.get_image_features(image[None]).pooler_output for image in inputs["pixel_values"]]
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    texts = [ids[:length][None] for ids, length in zip(inputs["input_ids"], lengths)]
    text_features = [model.get_text_features(text).pooler_output for text in texts]
    similarity = torch.cat(images) @ torch.cat(text_features).T
    matching = [
        [model(input_ids=text, pixel_values=image[None]).itm_score[0, 1] for text in texts]
        for image in inputs["pixel_values"]
    ]
    return torch.tensor(matching) + similarity, similarity


@pytest.fixture(params=({}, {"encoder_token_id": 39}, {"temperature": 1.0}), ids=("dense", "encoder_token", "pruned"))
def scored(request):
    """A model, 5 images and 6 texts of different lengths, and all their scores."""
    options = dict(request.param)
    temperature = options.pop("temperature", 0.0)
    model = make_retrieval(**options)
    model.set_pruning(temperature=temperature)
    inputs = pairs(6, lengths=(9, 5, 7, 9, 3, 6))
    inputs["pixel_values"] = inputs["pixel_values"][:5]
    with torch.no_grad():
        scores, similarity = score_all(model, inputs)
        if temperature:  # of different lengths, or it is no test
            text = {name: inputs[name][:5] for name in ("input_ids", "attention_mask")}
            assert len(model(pixel_values=inputs["pixel_values"], **text).vision_tokens[-1].unique()) > 1
    return model, inputs, scores, similarity


@pytest.mark.parametrize("batch_size", (1, 4, 256))
def test_with_a_long_shortlist_all_pairs_are_scored(scored, batch_size):
    model, inputs, scores, _ = scored
    for images in (inputs["pixel_values"].split(2), [inputs["pixel_values"]]):
        image_to_text, text_to_image = score_images_and_texts(
            model, images, inputs["input_ids"], inputs["attention_mask"], k=100, batch_size=batch_size
        )
        torch.testing.assert_close(image_to_text, scores, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(text_to_image, scores.T, atol=1e-4, rtol=1e-4)


def test_off_the_shortlist_nothing_is_scored(scored):
    model, inputs, scores, similarity = scored
    found = score_images_and_texts(
        model, inputs["pixel_values"].split(2), inputs["input_ids"], inputs["attention_mask"], k=2, batch_size=3
    )
    for result, all_scores, similar in zip(found, (scores, scores.T), (similarity, similarity.T)):
        for row, expected, near in zip(result, all_scores, similar):
            listed = near.argsort(descending=True)[:2].sort().values
            assert torch.equal((row != NOT_LISTED).nonzero().flatten(), listed)
            torch.testing.assert_close(row[listed], expected[listed], atol=1e-4, rtol=1e-4)


def test_scores_are_finer_than_the_model_s_numbers(model):
    inputs = pairs(6)
    model.to(torch.bfloat16)
    for scores in score_images_and_texts(
        model, [inputs["pixel_values"]], inputs["input_ids"], inputs["attention_mask"]
    ):
        assert scores.dtype == torch.float32 and len(scores.unique()) == 36


def test_a_shortlist_holds_at_least_one(model):
    inputs = pairs(2)
    with pytest.raises(ValueError, match="k=0"):
        score_images_and_texts(model, [inputs["pixel_values"]], inputs["input_ids"], inputs["attention_mask"], k=0)


# Budgets


@pytest.mark.parametrize("training", (True, False))
def test_budgets_are_evaluated_side_by_side(blip, training):
    model = MadtpBlipForQuestionAnswering.from_blip(blip, num_alignment_tokens=12).train(training)
    inputs = {**make_inputs((9, 5, 7, 4, 8, 6, 9), seed=5), "index": torch.arange(7)}
    batches = [
        {name: value[rows] for name, value in inputs.items()} for rows in (slice(0, 3), slice(3, 6), slice(6, 7))
    ]
    schedule = {entry["reduction"]: entry["temperature"] for entry in calibrate(model, batches, [0.3, 0.5])}
    model.set_pruning(temperature=0.123)

    def predict(batch):
        assert not model.training
        return [(index, model.config.pruning_temperature) for index in batch["index"].tolist()]

    results = evaluate_budgets(model, batches, [0.0, 0.5, 0.3], predict)
    assert model.training is training and model.config.pruning_temperature == 0.123
    assert [result.reduction_asked for result in results] == [0.0, 0.5, 0.3]
    model.eval()
    for result in results:
        temperature = schedule.get(result.reduction_asked, 0.0)
        assert result.predictions == [(index, temperature) for index in range(7)]
        model.set_pruning(temperature=temperature)
        with torch.no_grad():
            known = [{name: value for name, value in batch.items() if name != "index"} for batch in batches]
            reached = torch.cat([measure(model, batch, model(**batch)) for batch in known]).mean().item()
        assert result.reduction_reached == pytest.approx(reached, abs=1e-6)
        assert result.reduction_reached == pytest.approx(result.reduction_asked, abs=0.02)
        assert result.gflops == pytest.approx(results[0].gflops * (1 - reached), rel=0.02) and result.seconds > 0


@pytest.mark.parametrize("task", TASKS)
def test_tokens_are_counted_as_the_model_predicts(task):
    """The encoders run once for each budget and batch, and what they had is what `forward` says."""
    model = make_task_model(task)
    model.config.pruning_schedule = [[0.2, 0.5], [0.4, 3.0]]
    batches = [TASKS[task].make_inputs(lengths, seed=seed) for seed, lengths in enumerate([(9, 5, 7), (8, 6)])]
    passes = []
    model.vision_model.register_forward_hook(lambda *_: passes.append(model.config.pruning_temperature))

    def predict(batch):
        if model.can_generate():
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            if task == "captioning":
                inputs = {"pixel_values": inputs["pixel_values"]}
            return model.generate(**inputs, max_new_tokens=2).tolist()
        return model(**{name: value for name, value in batch.items() if name != "labels"})[0].tolist()

    results = evaluate_budgets(model, batches, [0.0, 0.4], predict)
    assert passes == [0.0, 3.0] * 2
    # A predictor that sees one sample at a time, or doesn't ask the model, gets the same counts from another pass.
    for other in (
        lambda batch: [
            predict({name: value[i : i + 1] for name, value in batch.items()})
            for i in range(len(batch["pixel_values"]))
        ],
        lambda batch: [None] * len(batch["pixel_values"]),
    ):
        for one, two in zip(results, evaluate_budgets(model, batches, [0.0, 0.4], other)):
            assert (one.reduction_reached, one.gflops) == (two.reduction_reached, two.gflops)
    for result, temperature in zip(results, (0.0, 3.0)):
        model.set_pruning(temperature=temperature)
        with torch.no_grad():
            known = [{name: value for name, value in batch.items() if name != "index"} for batch in batches]
            reached = torch.cat([measure(model, batch, model(**batch)) for batch in known]).mean().item()
        assert result.reduction_reached == pytest.approx(reached, abs=1e-6)
    assert results[1].reduction_reached > 0.2


def test_the_model_is_restored_when_a_prediction_fails(blip):
    model = MadtpBlipForQuestionAnswering.from_blip(blip, num_alignment_tokens=12).train()
    model.config.pruning_schedule = [[0.3, 0.5]]
    with pytest.raises(ZeroDivisionError):
        evaluate_budgets(model, [make_inputs()], [0.3], lambda batch: 1 / 0)
    assert model.training and model.config.pruning_temperature == 0


def test_a_report_is_printed_and_written(tmp_path, capsys):
    rows = [
        {"reduction asked": 0.0, "accuracy %": 0.915, "GFLOPs": 12.3456},
        {"reduction asked": 0.5, "accuracy %": 0.9, "GFLOPs": 6.1},
    ]
    report("7 questions", rows, tmp_path / "deep" / "folder", baseline=0.41, chance={"mean %": 0.1}, raw=[1])
    written = json.loads((tmp_path / "deep" / "folder" / "results.json").read_text())
    assert set(written.pop("versions")) == {"madtp_hf", "transformers", "torch", "python"}
    assert written == {
        "title": "7 questions",
        "results": rows,
        "baseline": 0.41,
        "chance": {"mean %": 0.1},
        "raw": [1],
    }
    printed = capsys.readouterr().out
    for text in ("7 questions", "91.5%", "12.35", "accuracy", "baseline: 0.41", "chance: mean 10.0%"):
        assert text in printed
