import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from madtp_hf import MadtpBlipConfig, MadtpBlipForQuestionAnswering, count_flops
from madtp_hf.budgets.flops import reduction_of_flops
from madtp_hf.tasks import flop_formulas

from .conftest import TASKS, blip_config, make_blip, make_inputs, make_task_model


def torchs_counter() -> FlopCounterMode:
    """torch's own counter, which leaves fused attention out on the CPU alone, with a formula for it."""

    def attention_on_cpu(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query_shape, key_shape, value_shape)

    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_on_cpu}
    return FlopCounterMode(display=False, custom_mapping=formulas)


def test_torchs_registry_of_formulas_is_left_alone():
    code = """
from torch.utils.flop_counter import flop_registry
before = dict(flop_registry)
import madtp_hf.budgets.evaluation
assert flop_registry == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_alignment_scores_of_a_branch_of_another_width():
    """Folded, they cost the branch's width for each token and alignment token, whatever those are wide."""
    config = MadtpBlipConfig(vision_config={"hidden_size": 1024}, alignment_dim=48, num_alignment_tokens=100)
    vision, text = torch.full((13, 1), 577), torch.full((13, 1), 36)
    dense = count_flops(config, "retrieval", vision, text)
    config.pruning_temperature = 1.0
    scores = 12 * 100 * (577 * 1024 + 36 * 768)
    assert (count_flops(config, "retrieval", vision, text) - dense).item() == pytest.approx(scores, rel=1e-3)


def test_the_papers_figure_for_dense_blip_base_nlvr2():
    vision, text = torch.full((13, 2, 1), 577), torch.full((13, 1), 36)
    total = count_flops(MadtpBlipConfig(), "nlvr2", vision, text)
    assert total.shape == (1,) and total.dtype == torch.float32
    assert total.item() / 1e9 == pytest.approx(132.54, rel=1e-4)


@pytest.mark.parametrize("temperature", (0.0, 0.5, 5.0))
@pytest.mark.parametrize("modalities", (("vision", "text"), ("vision",)))
def test_equals_torchs_own_count(monkeypatch, temperature, modalities):
    monkeypatch.setattr(flop_formulas, "LAYER_NORM", 0)  # torch counts none
    blip = make_blip(vision_config={"hidden_size": 64}, text_config={"hidden_size": 64})
    model = MadtpBlipForQuestionAnswering.from_blip(blip, num_alignment_tokens=12, pruning_modalities=modalities)
    model.set_pruning(temperature=temperature)
    inputs = make_inputs(lengths=(11,))
    answers = inputs.pop("labels")
    with torch.no_grad(), torchs_counter() as counter:
        output = model(**inputs, decoder_input_ids=answers)
    expected = count_flops(model.config, "vqa", output.vision_tokens, output.text_tokens, answers.shape[1])
    # A FLOP here is a multiply-accumulate, torch's is half of one; merging the dropped tokens is the little that is
    # left.
    assert expected.item() == pytest.approx(counter.get_total_flops() / 2, rel=2e-3)


# Vision as wide as text and not, alignment tokens of a width of their own; a vocabulary that outweighs the rest of a
# decoder.
SIZES = {
    "same widths": ({"hidden_size": 64}, {"hidden_size": 64}, {}),
    "wide vision": ({"hidden_size": 96}, {"hidden_size": 64, "vocab_size": 3000}, {}),
    "wide text": ({"hidden_size": 48}, {"hidden_size": 96}, {"alignment_dim": 64}),
}


@pytest.mark.parametrize("temperature", (0.0, 0.5, 5.0))
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("task", TASKS)
def test_equals_torchs_own_count_for_every_task(monkeypatch, task, sizes, temperature):
    monkeypatch.setattr(flop_formulas, "LAYER_NORM", 0)  # torch counts none
    vision, text, overrides = SIZES[sizes]
    if task == "nlvr2":  # merge layers, from the seventh on
        text = {**text, "num_hidden_layers": 8}
    fields = blip_config(vision_config=vision, text_config=text).to_dict()
    fields.pop("model_type")
    model = TASKS[task].model_class(MadtpBlipConfig(**fields, num_alignment_tokens=12, **overrides)).eval()
    model.set_pruning(temperature=temperature)
    inputs = TASKS[task].make_inputs(lengths=(11,))
    answer_tokens = 0
    if "labels" in inputs:
        answers = inputs.pop("labels")
        answer_tokens = {"vqa": 4, "captioning": 11}.get(task, 0)
        if task == "vqa":
            inputs["decoder_input_ids"] = answers
    if task == "nlvr2":  # a pair of twins: of others the shorter is padded, and torch counts that
        inputs["pixel_values"] = inputs["pixel_values"][:, :1].expand(-1, 2, -1, -1, -1)
    with torch.no_grad(), torchs_counter() as counter:
        output = model(**inputs)
    assert (output.vision_tokens[-1] < 37).all() == (temperature > 0)
    expected = count_flops(model.config, task, output.vision_tokens, output.text_tokens, answer_tokens)
    total = counter.get_total_flops() / 2
    if temperature:  # maps that are folded into the alignment tokens, once a pass, are no sample's
        maps = [model.alignment.vision_projection, model.alignment.text_projection]
        folded = [linear for linear in maps[: 1 if task == "captioning" else 2] if linear is not None]
        total -= sum(12 * linear.out_features * (linear.in_features + 1) for linear in folded)
    # Dense, to the last one.
    assert expected.item() == pytest.approx(total, rel=5e-3 if temperature else 1e-6)


def test_each_image_of_a_pair_is_counted_by_itself():
    """The two cost as much as half of one twice and half of the other twice, where the text is the same."""
    config = MadtpBlipConfig(pruning_temperature=1.0)
    left, right = torch.full((13, 1), 577), torch.linspace(577, 80, 13).long().unsqueeze(1)
    text = torch.full((13, 1), 36)
    mixed, lefts, rights = (
        count_flops(config, "nlvr2", torch.stack(pair, dim=1), text).item()
        for pair in ((left, right), (left, left), (right, right))
    )
    assert mixed == pytest.approx((lefts + rights) / 2, rel=1e-6) and rights < 0.7 * lefts


@pytest.mark.parametrize("task", ("captioning", "nlvr2", "retrieval"))
def test_each_sample_of_a_batch_is_counted_by_itself(task):
    model = make_task_model(task)
    model.set_pruning(temperature=3.0)
    with torch.no_grad():
        output = model(**TASKS[task].make_inputs())
    vision, text = output.vision_tokens, output.text_tokens
    answers = torch.tensor([9, 5, 7]) if task == "captioning" else torch.zeros(3)
    together = count_flops(model.config, task, vision, text, answers)
    saved = reduction_of_flops(model.config, task, vision, text, answers)
    dense_vision = torch.full_like(vision, 37)
    dense_text = None if text is None else text[:1].expand_as(text)
    model.set_pruning(None)
    dense = count_flops(model.config, task, dense_vision, dense_text, answers)
    torch.testing.assert_close(saved, 1 - together / dense)
    assert together.shape == (3,) and (saved > 0.2).all()
    model.set_pruning(temperature=3.0)
    for i in range(3):
        text_of_one = None if text is None else text[:, i : i + 1]
        alone = count_flops(model.config, task, vision[..., i : i + 1], text_of_one, answers[i])
        assert alone.item() == together[i].item()


def test_each_sample_is_counted_by_itself(model):
    model.set_pruning(temperature=3.0)
    with torch.no_grad():
        output = model(**make_inputs())
    counts = (output.vision_tokens, output.text_tokens)
    together = count_flops(model.config, "vqa", *counts, answer_tokens=torch.tensor([4, 4, 4]))
    for i in range(3):
        alone = count_flops(model.config, "vqa", counts[0][:, i : i + 1], counts[1][:, i : i + 1], answer_tokens=4)
        assert alone.item() == together[i].item()
    saved = reduction_of_flops(model.config, "vqa", *counts)
    model.set_pruning(None)
    with torch.no_grad():
        dense = model(**make_inputs())
    dense = count_flops(model.config, "vqa", dense.vision_tokens, dense.text_tokens)
    torch.testing.assert_close(saved, 1 - count_flops_at(model, 3.0, counts) / dense)


def count_flops_at(model, temperature, counts):
    model.set_pruning(temperature=temperature)
    return count_flops(model.config, "vqa", *counts)


def test_bad_input_is_named():
    config = MadtpBlipConfig()
    vision, text = torch.full((13, 1), 577), torch.full((13, 1), 36)
    with pytest.raises(ValueError, match="task='gqa': expected one of 'vqa'"):
        count_flops(config, "gqa", vision, text)
    with pytest.raises(ValueError, match="text_tokens is missing"):
        count_flops(config, "vqa", vision)
    with pytest.raises(ValueError, match="vision_tokens has 5 rows: expected one more than layers, 13"):
        count_flops(config, "vqa", vision[:5], text)
    with pytest.raises(
        ValueError, match=r"vision_tokens has shape \(13, 1\): expected \(layers \+ 1, 2, batch_size\)"
    ):
        count_flops(config, "nlvr2", vision, text)
    with pytest.raises(ValueError, match="text_tokens has 5 rows: expected one more than layers, 13"):
        count_flops(config, "retrieval", vision, text[:5])
