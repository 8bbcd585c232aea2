"""The benchmarks' other methods on CLIP's towers."""

import sys
from pathlib import Path

import pytest
import torch

from madtp_hf.budgets.passes import measure

from .helpers.clip import make_clip_inputs, make_clip_model


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from methods import FIXED, VARIANTS, find_schedule, make_method


LENGTHS = (9, 5, 12, 7)


@pytest.mark.parametrize("method", FIXED)
@torch.no_grad()
def test_a_schedule_reaches_its_reduction_and_leaves_the_text(method):
    model, inputs = make_clip_model(), make_clip_inputs(LENGTHS)
    dense = model(**inputs)
    schedule, reached = find_schedule(method, model.config, "clip", 0.4, torch.tensor(LENGTHS))
    assert reached == pytest.approx(0.4, abs=0.06)
    model.set_pruning_method(make_method(method, schedule))
    output = model(**inputs)
    assert (output.vision_tokens == torch.tensor(schedule)[:, None]).all()
    assert measure(model, inputs, output).mean().item() == pytest.approx(reached, abs=1e-6)
    assert torch.equal(output.text_embeds, dense.text_embeds)
    assert not torch.allclose(output.image_embeds, dense.image_embeds, atol=1e-3)
    alone = model(**{name: value[:1] for name, value in inputs.items()})
    if method != "random":
        torch.testing.assert_close(alone.image_embeds, output.image_embeds[:1], atol=1e-5, rtol=0)
    model.set_pruning_method(make_method(method, [schedule[0]] * len(schedule)))
    torch.testing.assert_close(model(**inputs).image_embeds, dense.image_embeds, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", VARIANTS)
@torch.no_grad()
def test_variants_reduce_both_towers_otherwise_than_madtp(method, path):
    model, inputs = make_clip_model(), make_clip_inputs(LENGTHS)
    model.set_pruning(temperature=3.0)
    madtp = model(**inputs)
    model.set_pruning_method(make_method(method))
    variant = model(**inputs)
    for tokens in ("vision_tokens", "text_tokens"):
        assert (variant[tokens][-1] <= variant[tokens][0]).all() and (variant[tokens][-1] < variant[tokens][0]).any()
    assert torch.isfinite(variant.logits_per_image).all()
    assert not torch.equal(variant.logits_per_image, madtp.logits_per_image)
