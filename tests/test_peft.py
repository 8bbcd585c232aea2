"""LoRA by peft: training, saving, loading, merging, publishing, as peft's users do it."""

import copy

import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from transformers import AutoModel, Trainer, TrainingArguments, pipeline

from madtp_hf import (
    MadtpBlipConfig,
    MadtpBlipForQuestionAnswering,
    ReductionCallback,
    calibrate,
    create_optimizer,
)
from madtp_hf.budgets.calibration import measure_reduction

from .conftest import TASKS, make_blip, make_inputs, make_task_model
from .helpers.clip import make_clip_inputs, make_clip_model
from .test_reduction_callback import Rows


peft = pytest.importorskip("peft")
BATCHES = [make_inputs((9, 5, 7, 12), seed=seed) for seed in range(3)]


def logits(model, inputs=None):
    with torch.no_grad():
        return model.eval()(**(inputs or make_inputs())).logits


def add_lora(model, target_modules="all-linear", **options):
    config = peft.LoraConfig(r=4, target_modules=target_modules, modules_to_save=["alignment"], **options)
    return peft.get_peft_model(model, config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A LoRA trained under pruning by the stock `Trainer`, calibrated and saved: the peft model and the folders of the
    dense model and the adapter."""
    folder = tmp_path_factory.mktemp("lora")
    make_blip().save_pretrained(folder / "dense")
    torch.manual_seed(0)
    model = add_lora(MadtpBlipForQuestionAnswering.from_blip(folder / "dense", num_alignment_tokens=12))
    before = copy.deepcopy(model.state_dict())
    callback = ReductionCallback(0.4)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=40,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=Rows(),
        callbacks=[callback],
        optimizers=(create_optimizer(model, 1e-3), None),
    )
    trainer.train()
    calibrate(model, BATCHES, [0.3, 0.5])
    model.set_pruning(reduction=0.5)
    model.save_pretrained(folder / "adapter")
    model.config.save_pretrained(folder / "adapter" / "pruning")
    return model, folder, before, trainer


def load(folder, source=None, **options):
    """As the documentation says it."""
    config = MadtpBlipConfig.from_pretrained(source or folder / "adapter", subfolder="pruning", **options)
    base = MadtpBlipForQuestionAnswering.from_pretrained(folder / "dense", config=config)
    return peft.PeftModel.from_pretrained(base, source or folder / "adapter", **options)


def test_what_is_learned_is_the_adapter_and_the_alignment_tokens(trained):
    model, _, before, trainer = trained
    now = {name: value for name, value in model.state_dict().items() if not name.endswith(".schedule")}
    changed = {name for name, value in now.items() if not torch.equal(value, before[name])}
    assert "base_model.model.alignment.modules_to_save.default.tokens" in changed
    assert "base_model.model.vision_model.encoder.layers.0.self_attn.qkv.lora_B.default.weight" in changed
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    reductions = [entry["reduction"] for entry in trainer.state.log_history if "reduction" in entry]
    assert sum(reductions[-20:]) / 20 == pytest.approx(0.4, abs=0.03)
    fast, slow = trainer.optimizer.param_groups
    assert slow["params"] == [model.get_base_model().alignment.tokens]  # one width: there are no projections
    assert slow["initial_lr"] == pytest.approx(fast["initial_lr"] / 100)
    assert all(parameter.requires_grad for parameter in fast["params"])
    assert not model._forward_hooks


def test_a_saved_adapter_brings_its_alignment_tokens_and_its_schedule(trained):
    model, folder, *_ = trained
    loaded = load(folder)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    for reduction in (0.3, 0.5):
        loaded.set_pruning(reduction=reduction)
        reached = measure_reduction(loaded, BATCHES, **loaded.config.pruning_setting)
        assert reached == pytest.approx(reduction, abs=0.01)
    # Without the adapter, the dense model is as it was.
    model.set_pruning(None)
    with model.disable_adapter():
        torch.testing.assert_close(
            logits(model), logits(MadtpBlipForQuestionAnswering.from_blip(folder / "dense")), atol=1e-5, rtol=0
        )
    model.set_pruning(reduction=0.5)


def test_the_schedule_comes_back_with_the_adapter(trained, tmp_path):
    model, folder, *_ = trained
    model.save_pretrained(tmp_path)
    for _ in range(2):  # and again, once the model has saved its own
        base = MadtpBlipForQuestionAnswering.from_blip(folder / "dense", num_alignment_tokens=12)
        assert base.config.pruning_schedule is None
        loaded = peft.PeftModel.from_pretrained(base, tmp_path)
        assert loaded.config.pruning_schedule == model.config.pruning_schedule
        loaded.set_pruning(reduction=0.5)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
        loaded.save_pretrained(tmp_path)
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(model))
    without = {name: value for name, value in peft.get_peft_model_state_dict(model).items() if "schedule" not in name}
    peft.set_peft_model_state_dict(model, without)  # an adapter that was saved before it was calibrated


def test_transformers_own_load_adapter(trained):
    model, folder, *_ = trained
    config = MadtpBlipConfig.from_pretrained(folder / "adapter", subfolder="pruning")
    base = MadtpBlipForQuestionAnswering.from_pretrained(folder / "dense", config=config)
    base.load_adapter(folder / "adapter")
    torch.testing.assert_close(logits(base), logits(model), rtol=0, atol=1e-5)


def test_merged_it_is_a_plain_checkpoint(trained, tmp_path):
    model, folder, *_ = trained
    expected = logits(model)
    merged = load(folder).merge_and_unload()
    assert type(merged) is MadtpBlipForQuestionAnswering
    assert not any("lora" in name or "modules_to_save" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded, info = AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded), logits(merged), rtol=0, atol=1e-5)
    decoder = loaded.text_decoder
    assert decoder.cls.predictions.decoder.weight is decoder.bert.embeddings.word_embeddings.weight
    loaded.set_pruning(reduction=0.3)  # the schedule is there


def test_the_pipeline_answers_with_the_adapter(trained, processor):
    model, folder, *_ = trained
    image = Image.effect_noise((48, 48), 90).convert("RGB")
    asked = {"image": image, "question": "how many sevens are there?", "max_new_tokens": 3}
    answer = model.eval().as_pipeline(processor)(**asked)
    merged = load(folder).merge_and_unload().eval().as_pipeline(processor)(**asked)
    assert answer[0]["answer"] == merged[0]["answer"]
    assert answer[0]["score"] == pytest.approx(merged[0]["score"], rel=1e-3)


def test_published_and_loaded(hub, trained):
    model, folder, *_ = trained
    api = HfApi(token="hf_alice")
    api.create_repo("org/blip-lora")
    api.upload_folder(repo_id="org/blip-lora", folder_path=folder / "adapter")
    files = hub.files("org/blip-lora")
    assert {"adapter_config.json", "adapter_model.safetensors", "pruning/config.json", "README.md"} <= set(files)
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    loaded = load(folder, "org/blip-lora")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    loaded.set_pruning(reduction=0.3)
    # And by peft's own way.
    model.push_to_hub("org/again", token="hf_alice")
    assert hub.files("org/again")["adapter_model.safetensors"] == files["adapter_model.safetensors"]


@pytest.mark.parametrize("published", (False, True))
def test_an_adapter_of_a_pruned_checkpoint_loads_by_its_name_alone(hub, processor, tmp_path, published):
    """Where this package is not: `AutoModel` and `pipeline` fetch the checkpoint that the adapter is of, its code and
    its schedule."""
    source, adapter = str(tmp_path / "pruned"), str(tmp_path / "adapter")
    base = make_task_model("vqa")
    calibrate(base, BATCHES, [0.3, 0.5])
    base.set_pruning(reduction=0.3)
    if published:
        source, adapter = "org/pruned", "org/adapter"
        base.push_to_hub(source, token="hf_alice")
        processor.push_to_hub(source, token="hf_alice")
    else:
        base.save_pretrained(source)
        processor.save_pretrained(source)
    model = add_lora(MadtpBlipForQuestionAnswering.from_pretrained(source), init_lora_weights=False)
    if published:
        model.push_to_hub(adapter, token="hf_alice")
    else:
        model.save_pretrained(adapter)
        model.config.save_pretrained(f"{adapter}/pruning")  # is not in the way
    loaded = AutoModel.from_pretrained(adapter, trust_remote_code=True)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert (logits(loaded) - logits(base)).abs().max() > 0.1
    loaded.set_pruning(reduction=0.5)
    tools = {"tokenizer": source, "image_processor": source}
    ask = pipeline("visual-question-answering", adapter, trust_remote_code=True, **tools)
    asked = {"image": Image.new("RGB", (48, 48)), "question": "how many sevens are there?", "max_new_tokens": 3}
    expected = model.as_pipeline(processor)(**asked)
    assert ask(**asked)[0]["score"] == pytest.approx(expected[0]["score"], rel=1e-4)
    assert ask(**asked)[0]["answer"] == expected[0]["answer"]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_takes_lora_and_merges(task):
    """On every linear map, and with a width of their own for the alignment tokens, whose projections are learned as
    well."""
    model = add_lora(make_task_model(task, {"alignment_dim": 8}), init_lora_weights=False)
    model.set_pruning(temperature=1.0)
    inputs = TASKS[task].make_inputs()
    output = model.train()(**inputs, **TASKS[task].to_train)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) <= parameter.requires_grad, name
        if "modules_to_save" in name and task != "captioning":  # which encodes no text to align
            assert parameter.grad.abs().max() > 0, name
    with torch.no_grad():
        adapted = model.eval()(**inputs)[TASKS[task].scores]
        merged = model.merge_and_unload()(**inputs)[TASKS[task].scores]
    torch.testing.assert_close(merged, adapted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    (
        {"target_modules": "all-linear"},
        {"target_modules": ["text_projection"]},
        {"target_modules": ["q_proj", "v_proj", "visual_projection"], "use_dora": True},
        {"target_modules": ["fc1", "fc2"], "modules_to_save": ["alignment"]},
        {"target_modules": r".*vision_model.*\.(q_proj|k_proj)"},
    ),
    ids=("all-linear", "text_projection", "dora", "modules_to_save", "pattern"),
)
def test_adapters_of_clip(options):
    """Alignment projections are nobody's linear map, and their names nobody's target."""
    model = make_clip_model({"num_alignment_tokens": 12})
    model.set_pruning(temperature=1.0)
    inputs = make_clip_inputs()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **options)).eval()
    adapters = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A") and "alignment" in name]
    assert adapters == []
    with torch.no_grad():
        expected = adapted(**inputs).logits_per_image
        merged = adapted.merge_and_unload()(**inputs).logits_per_image
    torch.testing.assert_close(merged, expected, atol=1e-3, rtol=1e-3)


def test_dora_and_modules_to_save_of_blip():
    config = peft.LoraConfig(
        r=4,
        target_modules=["qkv", "query", "value"],
        use_dora=True,
        init_lora_weights=False,
        modules_to_save=["alignment"],
    )
    adapted = peft.get_peft_model(make_task_model("vqa", {"alignment_dim": 8}), config).eval()
    adapted.set_pruning(temperature=1.0)
    expected = logits(adapted)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, atol=1e-3, rtol=1e-3)
