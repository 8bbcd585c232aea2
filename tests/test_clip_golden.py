"""CLIP's golden cases: vision of the published towers, text of an independent
implementation; a committed part of them, and all where they are."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from madtp_hf import MadtpClipConfig, convert_original_checkpoint

from . import golden


WHOLE = Path(__file__).parents[2] / "shared" / "reference"
NEEDS_WHOLE = pytest.mark.skipif(
    not WHOLE.is_dir(), reason=f"all of CLIP's golden cases are not there: no folder {WHOLE}"
)


@pytest.fixture(scope="module", params=("committed", pytest.param("whole", marks=NEEDS_WHOLE)))
def recorded(request):
    """(what the cases' file holds, the tensors by name, the original state dict)"""
    if request.param == "whole":
        tensors, weights = (load_file(WHOLE / f"clip.{part}.safetensors") for part in ("cases", "weights"))
        return json.loads((WHOLE / "clip.cases.json").read_text()), tensors, weights
    cases, tensors = golden.load_cases("clip.")
    as_tensors = ({n: torch.from_numpy(v) for n, v in part.items()} for part in (tensors, golden.load_clip_weights()))
    return cases, *as_tensors


@pytest.fixture(scope="module")
def recorded_model(recorded):
    """(the model, the tensors by name, the token counts by case and temperature)"""
    cases, tensors, weights = recorded
    sizes, counts = cases["config"], {}
    for entry in cases["cases"]:
        counts.setdefault(entry["key"], {}).update(entry["tokens_after_each_layer"])
    config = MadtpClipConfig(
        text_config={"num_attention_heads": sizes["text_heads"], "hidden_size": sizes["text_width"]},
        vision_config={"num_attention_heads": sizes["vision_heads"], "hidden_size": sizes["vision_width"]},
    )
    model = convert_original_checkpoint(weights, "clip", config=config)
    assert model.config.text_config.eos_token_id == sizes["eot_token_id"]
    return model, tensors, counts


def close(value, expected):
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("with_feature", (False, True), ids=("folded", "with feature"))
@pytest.mark.parametrize("case", "0123")
def test_the_published_numbers(recorded_model, case, with_feature, path):
    model, tensors, all_counts = recorded_model
    if f"clip.{case}.pixel_values" not in tensors:
        pytest.skip(f"case {case} is not among the committed ones")
    checked = 0
    for key, counts in all_counts.items():
        if not key.startswith(f"clip.{case}."):
            continue
        temperature = float(key.rpartition("tau")[2])
        model.set_pruning(temperature=temperature)
        with torch.no_grad():
            if "vision" in counts:
                # Three images at once were recorded with as many tokens for each.
                model.config.pruning_granularity = "batch" if case == "3" else "instance"
                images = model._encode_images(tensors[f"clip.{case}.pixel_values"], with_feature)
                model.config.pruning_granularity = "instance"
                assert images.num_tokens[1:].amax(dim=1).tolist() == counts["vision"]
                close(model.visual_projection(images.pooled), tensors[f"{key}.image_feature"])
                if with_feature and temperature > 0:
                    expected = tensors[f"{key}.image_alignment_feature"]
                    close(images.feature / expected.abs().max(), expected / expected.abs().max())
                checked += 1
            if "text" in counts or temperature == 0:
                texts = model._encode_text(tensors[f"clip.{case}.input_ids"], with_feature=with_feature)
                if temperature > 0:
                    assert texts.num_tokens[1:].tolist() == counts["text"]
                close(model.text_projection(texts.pooled), tensors[f"{key}.text_feature"])
                checked += 1
    assert checked >= 7


@NEEDS_WHOLE
def test_the_committed_part_is_of_the_whole():
    expected = load_file(WHOLE / "clip.weights.safetensors")
    weights = golden.load_clip_weights()
    assert weights.keys() == expected.keys()
    for name, values in weights.items():
        # Exactly what was recorded; another machine's logarithm may round once otherwise.
        np.testing.assert_array_max_ulp(values, expected[name].numpy(), maxulp=1)
    cases, tensors = golden.load_cases("clip.")
    whole = json.loads((WHOLE / "clip.cases.json").read_text())
    assert cases["config"] == whole["config"] and all(entry in whole["cases"] for entry in cases["cases"])
    expected = load_file(WHOLE / "clip.cases.safetensors")
    assert all(np.array_equal(values, expected[name].numpy()) for name, values in tensors.items())
