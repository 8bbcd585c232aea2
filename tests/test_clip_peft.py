"""LoRA on CLIP by peft: learned under pruning, saved with its alignment tokens and its schedule, loaded, merged."""

import pytest
import torch

from madtp_hf import MadtpClipConfig, MadtpClipModel, ReductionCallback, calibrate, create_optimizer
from madtp_hf.budgets.calibration import measure_reduction

from .helpers.clip import make_clip, make_clip_inputs
from .test_clip_training import train


peft = pytest.importorskip("peft", reason="peft is not installed")


def test_an_adapter_learns_under_pruning_and_comes_back(tmp_path):
    make_clip().save_pretrained(tmp_path / "dense")
    model = MadtpClipModel.from_clip(tmp_path / "dense", num_alignment_tokens=12)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"], modules_to_save=["alignment"])
    model = peft.get_peft_model(model, config)
    optimizers = (create_optimizer(model, 3e-3), None)
    trainer = train(
        model,
        tmp_path / "trainer",
        steps=25,
        callbacks=[ReductionCallback(0.4)],
        optimizers=optimizers,
        logging_steps=1,
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    for name, tensor in model.get_base_model().state_dict().items():
        if "lora_" not in name and not name.startswith("alignment."):
            assert torch.equal(tensor, before[name.replace(".base_layer", "")]), name

    batches = [make_clip_inputs((9, 5, 12, 7), seed) for seed in range(2)]
    calibrate(model, batches, [0.4])
    model.set_pruning(reduction=0.4)
    model.save_pretrained(tmp_path / "adapter")
    model.config.save_pretrained(tmp_path / "adapter" / "pruning")
    config = MadtpClipConfig.from_pretrained(tmp_path / "adapter", subfolder="pruning")
    base = MadtpClipModel.from_pretrained(tmp_path / "dense", config=config)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    loaded.set_pruning(reduction=0.4)
    with torch.no_grad():
        expected = model.eval()(**batches[0]).logits_per_image
        torch.testing.assert_close(loaded(**batches[0]).logits_per_image, expected, atol=1e-4, rtol=1e-4)
        assert measure_reduction(loaded, batches, **model.setting_for(0.4)) == pytest.approx(0.4, abs=0.02)
        merged = loaded.merge_and_unload()
        assert type(merged) is MadtpClipModel
        torch.testing.assert_close(merged(**batches[0]).logits_per_image, expected, atol=1e-3, rtol=1e-3)
