"""CLIP's FLOPs in closed form, and what goes by them: calibration, frozen counts."""

import pytest
import torch

from madtp_hf import MadtpClipConfig, calibrate, count_flops
from madtp_hf.budgets.calibration import measure_reduction
from madtp_hf.budgets.evaluation import record_branches
from madtp_hf.budgets.passes import measure
from madtp_hf.tasks import flop_formulas

from .helpers.clip import make_clip_inputs, make_clip_model, make_texts
from .test_flops import torchs_counter


@pytest.mark.parametrize("temperature", (0.0, 0.5, 5.0))
@pytest.mark.parametrize("alignment_dim", (None, 24))
def test_equals_torchs_own_count(monkeypatch, alignment_dim, temperature):
    monkeypatch.setattr(flop_formulas, "LAYER_NORM", 0)  # torch counts none
    model, inputs = make_clip_model({"alignment_dim": alignment_dim}), make_clip_inputs((14,))
    model.set_pruning(temperature=temperature)
    with torch.no_grad(), torchs_counter() as counter:
        output = model(**inputs)
    assert (output.vision_tokens[-1] < 37).all() == (temperature > 0)
    assert (output.text_tokens[-1] < 14).all() == (temperature > 0)
    total = counter.get_total_flops() / 2
    if temperature:  # maps that are folded into the alignment tokens, once a pass, are no sample's
        width = alignment_dim or 32
        total -= sum(12 * layers * width * (branch + 1) for layers, branch in ((4, 48), (3, 32)))
    expected = count_flops(model.config, "clip", output.vision_tokens, output.text_tokens)
    assert expected.item() == pytest.approx(total, rel=5e-3 if temperature else 1e-6)


def test_clip_base():
    """ViT-B/32 and a text of 77 tokens: 4.4 GMACs for the image and 3 for the text, as is known of it."""
    config = MadtpClipConfig()
    vision, text = torch.full((13, 1), 50), torch.full((13, 1), 77)
    assert count_flops(config, "clip", vision, text).item() / 1e9 == pytest.approx(7.4, abs=0.1)
    with pytest.raises(ValueError, match="text_tokens is missing"):
        count_flops(config, "clip", vision)


def test_reductions_are_reached_and_written_down():
    model, batches = make_clip_model(), [make_clip_inputs((12, 5, 16, 8), seed) for seed in range(4)]
    calibrate(model, batches, [0.4, 0.5])
    assert model.config.calibrated_reductions == [0.4, 0.5] and not model.is_pruning
    for reduction in (0.4, 0.5):
        assert measure_reduction(model, batches, **model.setting_for(reduction)) == pytest.approx(reduction, abs=0.01)
    model.set_pruning(reduction=0.5)
    with torch.no_grad(), record_branches(model) as outputs:
        output = model(**batches[0])
    assert torch.equal(outputs["vision"].num_tokens, output.vision_tokens)
    assert torch.equal(outputs["text"].num_tokens, output.text_tokens)


@pytest.fixture(scope="module")
def frozen():
    model = make_clip_model()
    calibrate(model, [make_clip_inputs((12, 5, 16, 8), seed) for seed in range(4)], [0.35, 0.5], freeze=True)
    model.set_pruning(reduction=0.5)
    return model


def test_a_frozen_model_leaves_the_numbers_that_were_fixed(frozen, path):
    counts = {entry["temperature"]: (entry["vision"], entry["text"]) for entry in frozen.config.pruning_token_counts}
    vision, text = counts[frozen.config.pruning_temperature]
    reductions = []
    for seed in range(6, 9):
        inputs = make_clip_inputs((12, 5, 16, 8), seed)
        with torch.no_grad():
            output = frozen(**inputs)
        assert (output.vision_tokens.T[:, 1:] == torch.tensor(vision)).all()
        assert (output.text_tokens[1:] <= output.text_tokens[:1].clamp(max=torch.tensor(text)[:, None])).all()
        reductions.append(measure(frozen, inputs, output))
    assert torch.cat(reductions).mean() == pytest.approx(0.5, abs=0.05)


def test_a_frozen_output_depends_neither_on_its_batch_nor_on_padding(frozen, path):
    lengths = (12, 5, 16, 8, 3)
    inputs = make_clip_inputs(lengths)
    with torch.no_grad():
        together = frozen(**inputs)
        longer = frozen(make_texts(lengths, 24), inputs["pixel_values"])
        torch.testing.assert_close(longer.text_embeds, together.text_embeds, atol=1e-5, rtol=0)
        for index, length in enumerate(lengths):
            alone = frozen(inputs["input_ids"][index : index + 1, :length], inputs["pixel_values"][index : index + 1])
            for name in ("text_embeds", "image_embeds"):
                torch.testing.assert_close(alone[name][0], together[name][index], atol=1e-5, rtol=0)


def test_fixed_counts_that_no_layer_can_leave_are_named():
    """Of a text its first token, its end, two words and the merged one; of an image one less."""
    model = make_clip_model()
    layers = (4, 3)
    for vision, text in ((3, 5), (4, 4)):
        with pytest.raises(ValueError, match="each count at least 4 for vision and 5 for text"):
            model.config.pruning_token_counts = [[1.0, [vision] * layers[0], [text] * layers[1]]]
    model.config.pruning_granularity = "frozen"
    model.config.pruning_token_counts = [[1.0, [4] * layers[0], [5] * layers[1]]]
    model.set_pruning(temperature=1.0)
    inputs = make_clip_inputs((12, 3, 16, 8, 5, 6))
    with torch.no_grad():
        output, ends = model(**inputs), model._encode_text(inputs["input_ids"], output_positions=True).positions[-1]
    assert output.vision_tokens[1:].eq(4).all()
    assert output.text_tokens[1:].amax(dim=0).tolist() == [5, 3, 5, 5, 5, 5]
    assert [row[row >= 0][-1].item() for row in ends] == [11, 2, 15, 7, 4, 5]
