"""CLIP under the stock `Trainer`, with pruning and without."""

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from madtp_hf import ReductionCallback, RetrievalTrainer, create_optimizer
from madtp_hf.training.retrieval_trainer import ContrastiveMemory

from .helpers.clip import make_clip, make_clip_inputs, make_clip_model


class Pairs(torch.utils.data.Dataset):
    def __init__(self, number=8):
        inputs = make_clip_inputs([5 + index % 9 for index in range(number)], width=14)
        self.rows = [{name: value[index] for name, value in inputs.items()} for index in range(number)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def collate(rows):
    return {**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}, "return_loss": True}


def train(model, folder, steps=12, **options):
    settings = {"use_cpu": True, "report_to": [], "save_strategy": "no", "logging_steps": steps, "disable_tqdm": True}
    callbacks, optimizers = options.pop("callbacks", []), options.pop("optimizers", (None, None))
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        seed=0,
        **{"learning_rate": 1e-3, **settings, **options},
    )
    trainer = Trainer(
        model, arguments, data_collator=collate, train_dataset=Pairs(), callbacks=callbacks, optimizers=optimizers
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("temperature", (0.0, 3.0))
def test_the_loss_is_clips_and_the_alignment_loss(temperature, path):
    model, inputs = make_clip_model(), make_clip_inputs((9, 5, 7, 3))
    model.set_pruning(temperature=temperature)
    output = model(**inputs, return_loss=True)
    torch.testing.assert_close(output.task_loss, image_text_contrastive_loss(output.logits_per_text))
    torch.testing.assert_close(output.loss, output.task_loss + 0.1 * output.alignment_loss)
    assert (output.alignment_loss > 0.01) == (temperature > 0)
    output.loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []  # as distributed training waits for
    expected = torch.nn.functional.cosine_similarity(
        *(
            encode(inputs[name], with_feature=True).feature if temperature else torch.ones(1, 1)
            for encode, name in ((model._encode_images, "pixel_values"), (model._encode_text, "input_ids"))
        ),
        dim=-1,
    )
    torch.testing.assert_close(output.alignment_loss, 1 - expected.mean(), atol=1e-5, rtol=1e-5)


def test_with_pruning_off_gradients_are_those_of_transformers_clip():
    clip, inputs = make_clip(), make_clip_inputs()
    model = make_clip_model()
    for each in (clip, model):
        each(**inputs, return_loss=True).loss.backward()
    mine = dict(model.named_parameters())
    for name, parameter in clip.named_parameters():
        torch.testing.assert_close(mine[name].grad, parameter.grad, atol=1e-5, rtol=1e-4)


def test_the_stock_trainer_learns_under_pruning(tmp_path):
    model = make_clip_model()
    model.set_pruning(temperature=3.0)
    batch = collate(Pairs().rows)
    before = model(**batch)
    train(model, tmp_path, steps=30)
    after = model.eval()(**batch)
    assert after.task_loss < 0.7 * before.task_loss and after.alignment_loss < before.alignment_loss
    assert (after.vision_tokens[-1] < 37).all()


def test_the_callback_holds_a_reduction_and_gradient_checkpointing_changes_nothing(tmp_path):
    weights = []
    for checkpointing in (False, True):
        model, callback = make_clip_model(), ReductionCallback(0.5)
        optimizers = (create_optimizer(model, 1e-4), None)
        train(model, tmp_path, 25, callbacks=[callback], optimizers=optimizers, gradient_checkpointing=checkpointing)
        assert callback.reduction == pytest.approx(0.5, abs=0.1)
        weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=1e-4)


def test_the_trainer_evaluates(tmp_path):
    model = make_clip_model()
    model.set_pruning(temperature=3.0)
    trainer = train(model, tmp_path, steps=1)
    metrics = trainer.evaluate(Pairs(4))
    assert metrics["eval_loss"] > 0
    assert [len(part) for part in trainer.predict(Pairs(4)).predictions] == [4] * 4


# With a momentum encoder and queues


def make_retrieval_trainer(model, folder, rows=None, **options):
    settings = {"queue_size": 12, "momentum": 0.8, "distillation_warmup_steps": 1, **options}
    arguments = TrainingArguments(
        folder,
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        save_steps=2,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    rows = rows or [{**row, "image_ids": torch.tensor(index // 2)} for index, row in enumerate(Pairs(16).rows)]
    return RetrievalTrainer(model, arguments, data_collator=collate, train_dataset=rows, **settings)


def test_texts_of_the_same_image_are_no_negatives():
    model, inputs = make_clip_model(), make_clip_inputs((9, 5, 7, 3))
    alone = model(**inputs, return_loss=True, image_ids=torch.arange(4)).loss
    torch.testing.assert_close(alone, model(**inputs, return_loss=True).loss)
    logits = model(**inputs).logits_per_image
    targets = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    expected = sum(torch.nn.functional.cross_entropy(scores, targets) for scores in (logits, logits.T)) / 2
    torch.testing.assert_close(model(**inputs, return_loss=True, image_ids=torch.tensor([4, 4, 8, 9])).loss, expected)


def test_the_memory_of_clip():
    model, inputs = make_clip_model(), make_clip_inputs((9, 5, 7, 3))
    memory = ContrastiveMemory(model, queue_size=4, momentum=0.8, distillation=0.4)
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
        memory.follow(model)
        output = model(**inputs)
    batch = {**inputs, "image_ids": torch.arange(4)}
    for keys_there in (4, 8, 8):  # the batch, and what the queue held before
        keys = memory(batch, progress=1.0)
        assert keys.image.shape == (keys_there, 16) and keys.temperature is None
    soft = (output.image_embeds @ keys.text.T * model.logit_scale.exp()).softmax(dim=1)
    hard = memory(batch, progress=0.0).image_targets
    assert torch.equal(hard[:, :4], hard[:, 4:8])  # the same images, queued
    torch.testing.assert_close(keys.image_targets, 0.4 * soft + 0.6 * hard)


def test_retrieval_trainer_trains_clip_and_resumes(tmp_path):
    weights = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = make_clip_model()
        model.set_pruning(temperature=3.0)
        trainer = make_retrieval_trainer(model, tmp_path)
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trainer.train(resume_from_checkpoint=resume)
        assert (trainer.memory.id_queue >= 0).all()
        slow = trainer.memory.momentum_encoder.state_dict()
        moved = "vision_model.encoder.layers.0.self_attn.q_proj.weight"
        assert not torch.equal(model.state_dict()[moved], start[moved])
        assert not torch.equal(slow[moved], model.state_dict()[moved])
        weights.append((model.state_dict(), slow))
    for mine, theirs in zip(*weights):
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name])
    with pytest.raises(TypeError, match="expected a MadtpBlipForImageTextRetrieval or a MadtpClipModel"):
        make_retrieval_trainer(torch.nn.Linear(2, 2), tmp_path)
