import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from madtp_hf import MadtpBlipConfig, MadtpBlipForQuestionAnswering, count_flops, flops
from madtp_hf.flops import reduction_of_flops

from .conftest import make_blip, make_inputs


def test_the_papers_figure_for_dense_blip_base_nlvr2():
    vision, text = torch.full((13, 2, 1), 577), torch.full((13, 1), 36)
    total = count_flops(MadtpBlipConfig(), "nlvr2", vision, text)
    assert total.shape == (1,) and total.dtype == torch.float32
    assert total.item() / 1e9 == pytest.approx(132.54, rel=1e-4)


@pytest.mark.parametrize("temperature", (0.0, 0.5, 5.0))
@pytest.mark.parametrize("modalities", (("vision", "text"), ("vision",)))
def test_equals_torchs_own_count(monkeypatch, temperature, modalities):
    monkeypatch.setattr(flops, "LAYER_NORM", 0)  # torch counts none
    blip = make_blip(vision_config={"hidden_size": 64}, text_config={"hidden_size": 64})
    model = MadtpBlipForQuestionAnswering.from_blip(blip, num_alignment_tokens=12, pruning_modalities=modalities)
    model.set_pruning(temperature=temperature)
    inputs = make_inputs(lengths=(11,))
    answers = inputs.pop("labels")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model(**inputs, decoder_input_ids=answers)
    expected = count_flops(model.config, "vqa", output.vision_tokens, output.text_tokens, answers.shape[1])
    # A FLOP here is a multiply-accumulate, torch's is half of one; merging the dropped tokens is the little that is left.
    assert expected.item() == pytest.approx(counter.get_total_flops() / 2, rel=2e-3)


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
