"""CLIP's golden cases: vision of the published towers, text of an independent implementation; all where they are."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from madtp_hf import MadtpClipConfig, convert_original_checkpoint


FOLDER = Path(__file__).parents[2] / "shared" / "reference"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"CLIP's golden cases are not there: no folder {FOLDER}")


@pytest.fixture(scope="module")
def golden():
    """(the model, the tensors by name, the token counts by case and temperature)"""
    cases = json.loads((FOLDER / "clip.cases.json").read_text())
    sizes, counts = cases["config"], {}
    for entry in cases["cases"]:
        counts.setdefault(entry["key"], {}).update(entry["tokens_after_each_layer"])
    config = MadtpClipConfig(
        text_config={"num_attention_heads": sizes["text_heads"], "hidden_size": sizes["text_width"]},
        vision_config={"num_attention_heads": sizes["vision_heads"], "hidden_size": sizes["vision_width"]},
    )
    model = convert_original_checkpoint(FOLDER / "clip.weights.safetensors", "clip", config=config)
    assert model.config.text_config.eos_token_id == sizes["eot_token_id"]
    return model, load_file(FOLDER / "clip.cases.safetensors"), counts


def close(value, expected):
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("with_feature", (False, True), ids=("folded", "with feature"))
@pytest.mark.parametrize("case", "0123")
def test_the_published_numbers(golden, case, with_feature, path):
    model, tensors, all_counts = golden
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
                close(images.pooled, tensors[f"{key}.image_feature"])
                if with_feature and temperature > 0:
                    expected = tensors[f"{key}.image_alignment_feature"]
                    close(images.feature / expected.abs().max(), expected / expected.abs().max())
                checked += 1
            if "text" in counts or temperature == 0:
                texts = model._encode_text(tensors[f"clip.{case}.input_ids"], with_feature=with_feature)
                if temperature > 0:
                    assert texts.num_tokens[1:].tolist() == counts["text"]
                close(texts.pooled, tensors[f"{key}.text_feature"])
                checked += 1
    assert checked >= 7
