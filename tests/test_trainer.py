"""What people switch on in `Trainer`, with pruning and `ReductionCallback`; resuming is in `test_resuming.py`."""

import datasets
import pytest
import torch
from PIL import Image
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from madtp_hf import MadtpBlipForQuestionAnswering, ReductionCallback
from madtp_hf.data import QuestionAnsweringCollator

from .conftest import make_blip
from .test_reduction_callback import Rows


SETTINGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "remove_unused_columns": False,
}
ROWS = Rows(32)


def make_trainer(folder, trainer_class=Trainer, arguments_class=TrainingArguments, target=(0.3, 0.5), **options):
    """Options of the training arguments and of the trainer, by their names."""
    settings = {name: options.pop(name) for name in list(options) if hasattr(arguments_class, name)}
    torch.manual_seed(0)
    model = MadtpBlipForQuestionAnswering.from_blip(make_blip(), num_alignment_tokens=12)
    return trainer_class(
        model=model,
        args=arguments_class(output_dir=str(folder), **{**SETTINGS, **settings}),
        callbacks=[ReductionCallback(target, num_targets=2)],
        **{"train_dataset": ROWS, **options},
    )


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_bf16(tmp_path):
    """Mixed precision: the weights stay in float32, and what is learned is about the same."""
    exact, mixed = make_trainer(tmp_path), make_trainer(tmp_path, bf16=True)
    types = set()
    mixed.model.vision_model.encoder.layers[0].mlp.register_forward_hook(lambda *call: types.add(call[-1].dtype))
    exact.train()
    mixed.train()
    assert types == {torch.bfloat16} and mixed.model.dtype == torch.float32
    assert logged(mixed) == pytest.approx(logged(exact), rel=0.05)
    assert logged(mixed) != logged(exact)
    assert all(0 < reduction < 0.9 for reduction in logged(mixed, "reduction"))


def test_accumulated_gradients_are_those_of_a_larger_batch(tmp_path):
    settings = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
    whole = make_trainer(tmp_path, **settings)
    parts = make_trainer(tmp_path, **settings, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    whole.train()
    parts.train()
    assert logged(parts) == pytest.approx(logged(whole), rel=1e-4)
    assert logged(parts, "reduction") == pytest.approx(logged(whole, "reduction"), abs=1e-6)
    before = make_trainer(tmp_path).model.state_dict()
    moved = 0.0
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], value, rtol=0, atol=2e-5)
        moved = max(moved, (value - before[name]).abs().max().item())
    assert moved > 0.01


@pytest.mark.parametrize("reentrant", (False, True))
def test_gradient_checkpointing(tmp_path, reentrant):
    """The same training; layers are computed a second time, on the same tokens."""
    trainers = {
        name: make_trainer(tmp_path, optim="sgd", learning_rate=0.05, **options)
        for name, options in {
            "plain": {},
            "checkpointed": {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
            },
        }.items()
    }
    calls = dict.fromkeys(trainers, 0)
    for name, trainer in trainers.items():

        def count(*call, name=name):
            calls[name] += 1

        trainer.model.vision_model.encoder.layers[2].mlp.register_forward_pre_hook(count)
        trainer.train()
    plain, checkpointed = trainers.values()
    assert calls == {"plain": 8, "checkpointed": 16}  # a dense and a pruned pass in each of 4 steps
    assert logged(checkpointed) == pytest.approx(logged(plain), rel=1e-5)
    assert logged(checkpointed, "reduction") == logged(plain, "reduction")
    weights = plain.model.state_dict()
    for name, value in checkpointed.model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-5)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    accuracies, temperatures, largest, drawn = [0.2, 0.9, 0.4], [], [], []

    def compute_metrics(predictions):
        assert predictions.predictions.shape == (16, 4, 40)  # the decoder's logits alone
        temperatures.append(trainer.model.config.pruning_temperature)
        largest.append(callback._path.setting(callback.points[-1])["temperature"])
        drawn.append(callback._current(trainer.state.global_step - 1))
        return {"accuracy": accuracies[len(temperatures) - 1]}

    trainer = make_trainer(
        tmp_path,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        greater_is_better=True,
        eval_dataset=Rows(16),
        compute_metrics=compute_metrics,
    )
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ReductionCallback))
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4") and trainer.state.best_metric == 0.9
    best = MadtpBlipForQuestionAnswering.from_pretrained(trainer.state.best_model_checkpoint)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, best.state_dict()[name], rtol=0, atol=0)
    # Whatever a step drew, evaluations are at the largest target, and so is what is saved.
    assert set(drawn) == {0, 1} and len(set(temperatures)) > 1
    assert temperatures == pytest.approx(largest)
    assert best.config.pruning_temperature == temperatures[1]


def question_rows(count):
    words = ["seven", "three", "one", "two"]
    return [
        {
            "image": Image.effect_noise((48, 48), 10 + 20 * (index % 7)).convert("RGB"),
            "question": ["how many sevens are there?", "which digit?"][index % 2],
            "answers": [words[index % 4], words[index % 3]],
        }
        for index in range(count)
    ]


def test_predict_with_generate(tmp_path, processor):
    written, rows = [], question_rows(6)

    def compute_metrics(predictions):
        answers, labels = predictions
        texts = processor.tokenizer.batch_decode(answers.clip(0), skip_special_tokens=True)
        expected = processor.tokenizer.batch_decode(labels.clip(0), skip_special_tokens=True)
        written.extend(texts)
        assert set(expected) <= {"seven", "three", "one", "two"}
        return {"accuracy": sum(map(str.__eq__, texts, expected)) / len(texts)}

    trainer = make_trainer(
        tmp_path,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        predict_with_generate=True,
        generation_max_length=6,
        learning_rate=1e-6,  # the answers of a model that is trained on so little may be nothing but an end
        per_device_eval_batch_size=4,
        train_dataset=question_rows(16),
        eval_dataset=rows,
        data_collator=QuestionAnsweringCollator(processor, 38),
        processing_class=processor.tokenizer,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_accuracy"] <= 1 and metrics["eval_loss"] > 0 and len(written) == 6
    model = trainer.model.eval()
    batch = QuestionAnsweringCollator(processor, 38)(rows)
    batch.pop("labels")
    expected = processor.tokenizer.batch_decode(model.generate(**batch, max_length=6), skip_special_tokens=True)
    assert written == expected and len(set(written)) > 1


def test_a_streamed_data_set(tmp_path, processor):
    """Rows that come one after the other, with no length: `max_steps` says when to stop."""

    def rows():
        for index, row in enumerate(question_rows(24)):
            seen.append(index)
            yield row

    seen = []
    trainer = make_trainer(
        tmp_path,
        per_device_train_batch_size=4,
        train_dataset=datasets.IterableDataset.from_generator(rows).shuffle(seed=0, buffer_size=8),
        data_collator=QuestionAnsweringCollator(processor, 38),
    )
    trainer.train()
    assert trainer.state.global_step == 4 and len(logged(trainer)) == 4
    assert len(seen) >= 16
    assert all(0 < reduction < 0.9 for reduction in logged(trainer, "reduction"))
