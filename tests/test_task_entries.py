"""What `madtp_hf.tasks` says of each task is what its models, collators and metrics are."""

import pytest

from madtp_hf.budgets.evaluation import evaluate_task
from madtp_hf.data import load_digit_captions, load_digit_questions, load_digit_statements
from madtp_hf.families import BLIP
from madtp_hf.metrics import METRICS
from madtp_hf.tasks import TASKS, get_task

from .conftest import make_processor, make_task_model
from .helpers.clip import make_clip_model, make_clip_processor


DIGITS = {"vqa": load_digit_questions, "nlvr2": load_digit_statements}


BLIP_TASKS = [name for name, task in TASKS.items() if task.family is BLIP]


@pytest.mark.parametrize("name", BLIP_TASKS)
def test_an_entry_fits_its_model(name):
    task = get_task(name)
    model = make_task_model(name)
    assert task.name == name and type(model) is task.model_class and model.task == name
    assert {task.auto_class, "AutoModel"} <= set(model.config.auto_map)
    assert set(model.config.custom_pipelines) == {task.pipeline} and task.pipeline_call.format(text='"so"')
    assert model.can_generate() == (task.decoder_inputs is not None)
    assert hasattr(model, "text_encoder") == (task.text_encoder is not None)
    assert task.metric in METRICS


@pytest.mark.parametrize("name", BLIP_TASKS)
def test_an_entrys_collator_makes_what_its_model_takes(name):
    pytest.importorskip("sklearn")
    task = TASKS[name]
    model = make_task_model(name, image_text_hidden_size=16)
    start = {} if task.decoder_inputs is None else {"decoder_start_token_id": model.config.text_config.bos_token_id}
    rows = list(DIGITS.get(name, load_digit_captions)("test", 3))
    batch = task.collator(make_processor(), **start, max_length=12)(rows)
    output = model(**batch)
    assert output.loss.isfinite()
    assert output.vision_tokens.shape[1:] == ((task.num_images, 3) if task.num_images > 1 else (3,))
    assert (output.text_tokens is None) == (task.text_encoder is None)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_evaluated_at_each_budget(name):
    pytest.importorskip("sklearn")
    pytest.importorskip("evaluate", reason="metrics need evaluate: pip install 'madtp_hf[metrics]'")
    task = TASKS[name]
    model = make_clip_model() if name == "clip" else make_task_model(name, image_text_hidden_size=16)
    processor = make_clip_processor() if name == "clip" else make_processor()
    model.config.pruning_schedule = [[0.5, 5.0]]
    rows = list(DIGITS.get(name, load_digit_captions)("test", 4))
    dense, pruned = evaluate_task(model, processor, rows, batch_size=3)
    assert dense.keys() == pruned.keys() and task.headline in dense
    assert (dense["reduction asked"], dense["reached"], dense["times faster"]) == (0, 0, 1)
    assert pruned["reached"] > 0 and pruned["GFLOPs"] < dense["GFLOPs"] and pruned["times faster"] > 0
    assert not model.is_pruning
    right = {"vqa": "answer", "nlvr2": "label", "captioning": "captions"}.get(name)
    if right:  # the true answers score best
        answers = [row[right][0] if name == "captioning" else row[right] for row in rows]
        assert task.score(answers, rows)[task.headline] == pytest.approx(1)


def test_an_unknown_task_is_named():
    with pytest.raises(
        ValueError, match="task='gqa': expected one of 'vqa', 'captioning', 'nlvr2', 'retrieval', 'clip'"
    ):
        get_task("gqa")
