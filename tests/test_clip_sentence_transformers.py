"""A pruned CLIP in sentence-transformers, the lines of docs/clip.md, and BLIP retrieval."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from madtp_hf import MadtpClipModel

from .conftest import make_processor, make_task_model
from .helpers.clip import make_clip_model, make_clip_processor
from .helpers.pages import blocks_of


pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
DOCUMENT = Path(__file__).parents[1] / "docs" / "clip.md"


@pytest.fixture
def checkpoint(tmp_path):
    model = make_clip_model({"pruning_schedule": [[0.4, 1.0], [0.6, 4.0]]})
    model.save_pretrained(tmp_path / "clip")
    make_clip_processor().save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_the_documented_lines_encode_images_and_texts(checkpoint, tmp_path, monkeypatch, capsys):
    (block,) = (block.code for block in blocks_of(DOCUMENT) if "sentence_transformers" in block.code)
    image = Image.effect_noise((60, 40), 90).convert("RGB")
    image.save(tmp_path / "scene.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    # The test's tokenizer reads letters, and its model 24 of them.
    texts = ["red seven", "blue one"]
    block = re.sub(r"captions = \[.*?\n\]", f"captions = {texts}", block, flags=re.DOTALL)
    exec(block.replace("./clip-madtp", str(checkpoint)), names)
    assert "tensor" in capsys.readouterr().out

    model, processor = MadtpClipModel.from_pretrained(checkpoint).eval(), make_clip_processor()
    with torch.no_grad():
        for reduction in (0.5, 0.0):
            model.set_pruning(reduction=reduction)
            expected = model(
                **processor(images=Image.open("scene.png"), text=texts, padding=True, return_tensors="pt")
            )
            if reduction:
                assert (expected.vision_tokens[-1] < 37).all()
                pruned = expected
                for name, embeds in (("images", expected.image_embeds), ("texts", expected.text_embeds)):
                    encoded = torch.nn.functional.normalize(torch.as_tensor(names[name]))  # some versions leave it out
                    torch.testing.assert_close(encoded, embeds, atol=1e-4, rtol=0)
    assert not torch.allclose(pruned.image_embeds, expected.image_embeds, atol=1e-3)  # it was pruned


def test_what_is_saved_keeps_its_reduction(checkpoint, tmp_path):
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(checkpoint), trust_remote_code=True)
    encoder[0].model.set_pruning(reduction=0.6)
    expected = encoder.encode(["red seven"])
    encoder.save(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True)
    assert again[0].model.config.pruning_temperature == 4.0
    for reduction in (None, 0.6):  # what sentence-transformers saves takes one as well
        found = again.encode(["red seven"], reduction=reduction)
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), atol=1e-5, rtol=0)


@torch.no_grad()
def test_blip_retrieval_embeds_texts_and_images(tmp_path):
    from sentence_transformers import SentenceTransformer

    model = make_task_model("retrieval", {"pruning_schedule": [[0.3, 1.0], [0.6, 4.0]]}).eval()
    model.save_pretrained(tmp_path)
    processor = make_processor()
    processor.save_pretrained(tmp_path)
    encoder = SentenceTransformer(str(tmp_path), trust_remote_code=True)
    texts, image = ["is there a seven", "three"], Image.effect_noise((60, 40), 90).convert("RGB")
    tokens = processor.tokenizer(texts, padding=True, return_tensors="pt")
    pixels = processor.image_processor(image, return_tensors="pt").pixel_values
    found = []
    for reduction in (0.0, 0.5):
        model.set_pruning(reduction=reduction)
        expected = model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
        found.append(model.get_image_features(pixels).pooler_output)
        with encoder[0].model.pruning(reduction=reduction):
            torch.testing.assert_close(torch.as_tensor(encoder.encode(texts)), expected, atol=1e-4, rtol=0)
        # For this call alone, whatever applies otherwise.
        with encoder[0].model.pruning(reduction=0.5 - reduction):
            for given, features in ((texts, expected), ([image], found[-1])):
                embedded = torch.as_tensor(encoder.encode(given, reduction=reduction))
                torch.testing.assert_close(embedded, features, atol=1e-4, rtol=0)
    assert not torch.allclose(*found, atol=1e-3)
    with pytest.raises(ValueError, match="reduction"):
        encoder.encode(texts, reduction=0.9)
