"""Models made from transformers' BLIP, and from ones of ours."""

import pytest
import torch
from transformers import BlipForConditionalGeneration, BlipForQuestionAnswering

from madtp_hf import MadtpBlipForImagesAndTextClassification, MadtpBlipForImageTextRetrieval

from .conftest import (
    TASKS,
    TEMPERATURES,
    blip_config,
    close,
    make_retrieval_inputs,
    make_task_blip,
    make_task_model,
)


SOURCES = [(task, TASKS[task].blip_class) for task in TASKS] + [("nlvr2", BlipForQuestionAnswering)]


@pytest.mark.parametrize("task, blip_class", SOURCES)
@torch.no_grad()
def test_from_blip_copies(task, blip_class, tmp_path):
    torch.manual_seed(1)
    blip = blip_class(blip_config(text_config={"num_hidden_layers": 8})).eval()
    blip.save_pretrained(tmp_path)
    model_class = TASKS[task].model_class
    for source in (blip, str(tmp_path)):
        model = model_class.from_blip(source, num_alignment_tokens=7, pruning_temperature=2.0)
        assert model.config.pruning_temperature == 2.0 and not model.training
        assert model.alignment.tokens.shape == (7, 32)
        theirs, copied = blip.state_dict(), set()
        for name, tensor in model.state_dict().items():
            if any(new in name for new in ("alignment.", "cls_head.", "merge_layer.")):
                continue
            # Of NLVR2's two cross-attentions, either is BLIP's one.
            for side in "01":
                name = name.replace(f".self{side}.", ".self.").replace(f".dense{side}.", ".dense.")
            assert torch.equal(tensor, theirs[name]), name
            copied.add(name)
        left_behind = set(theirs) - copied
        if task != "nlvr2":
            assert not left_behind
            continue
        assert not any(name.startswith(("vision_model.", "text_encoder.")) for name in left_behind)
        for layer in (6, 7):  # a merge layer begins as the mean of the two
            merge = model.text_encoder.encoder.layer[layer].crossattention.output.merge_layer
            left, right = torch.randn(2, 5, 32)
            close(merge(torch.cat([left, right], dim=1)), (left + right) / 2)
    before = blip.vision_model.post_layernorm.weight.clone()
    model.vision_model.post_layernorm.weight.zero_()
    assert torch.equal(blip.vision_model.post_layernorm.weight, before)


@pytest.mark.parametrize("temperature", (0.0, *TEMPERATURES))
@torch.no_grad()
def test_visual_reasoning_from_blip_reads_a_pair_of_twins_as_blip_reads_the_one(temperature):
    """Both cross-attentions are BLIP's, and the mean of the same is the same: in all layers, merging ones too."""
    blip = make_task_blip("retrieval", text_config={"num_hidden_layers": 8})
    alone = MadtpBlipForImageTextRetrieval.from_blip(blip, num_alignment_tokens=12)
    pair = MadtpBlipForImagesAndTextClassification.from_blip(blip, num_alignment_tokens=12)
    pair.alignment.load_state_dict(alone.alignment.state_dict())
    inputs = make_retrieval_inputs()
    expected = blip(**inputs).question_embeds
    for model in (alone, pair):
        model.set_pruning(temperature=temperature)
    one = alone(**inputs)
    two = pair(**{**inputs, "pixel_values": inputs["pixel_values"].unsqueeze(1).expand(-1, 2, -1, -1, -1)})
    assert torch.equal(two.text_tokens, one.text_tokens)
    for side in (0, 1):
        assert torch.equal(two.vision_tokens[:, side], one.vision_tokens)
        close(two.image_embeds[:, side], one.image_embeds)
    close(two.text_states, one.question_embeds, atol=1e-4)
    if temperature == 0:
        close(two.text_states, expected, atol=1e-4)


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_from_a_model_of_ours_all_but_the_alignment_is_copied(task, tmp_path):
    model, inputs = make_task_model(task, text_config={"num_hidden_layers": 7}), TASKS[task].make_inputs()
    model.set_pruning(temperature=3.0)
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        again = type(model).from_blip(source, num_alignment_tokens=5, pruning_temperature=0.0)
        assert again.alignment.tokens.shape == (5, 32) and again.config.num_alignment_tokens == 5
        model.set_pruning(None)
        close(again(**inputs)[TASKS[task].scores], model(**inputs)[TASKS[task].scores])
    same_size = type(model).from_blip(model)
    assert not torch.equal(same_size.alignment.tokens, model.alignment.tokens)


@pytest.mark.parametrize("task", TASKS)
def test_from_blip_names_what_does_not_fit(task, tmp_path):
    model_class, expected = TASKS[task].model_class, TASKS[task].blip_class.__name__
    other = BlipForQuestionAnswering if task == "captioning" else BlipForConditionalGeneration
    other = other(blip_config())
    for wrong in (other, make_task_model("captioning" if task == "vqa" else "vqa")):
        with pytest.raises(TypeError, match=f"got a {type(wrong).__name__}: expected a {expected} or a "):
            model_class.from_blip(wrong)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"got .*, a {type(other).__name__}: expected a {expected} or a "):
        model_class.from_blip(tmp_path)
    with pytest.raises(TypeError, match="pruning_temprature"):
        model_class.from_blip(make_task_blip(task), pruning_temprature=1.0)
