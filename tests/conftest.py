import json
import os
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor

from madtp_hf import MadtpBlipForQuestionAnswering


os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # the models are small: more threads only wait for each other
REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
WORDS = "is there a seven three how many sevens are which digit leftmost yes no one two what color red of the image".split()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def reference():
    """The golden cases: (cases.json, tensors)."""
    if not REFERENCE.is_dir():
        pytest.skip(f"the published implementation's golden numbers are not there: no folder {REFERENCE}")
    from safetensors.torch import load_file

    return json.loads((REFERENCE / "cases.json").read_text()), load_file(REFERENCE / "cases.safetensors"), REFERENCE


def blip_config(**overrides) -> BlipConfig:
    text = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 24,
        "bos_token_id": 38,
        "sep_token_id": 3,
        "eos_token_id": 3,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 8,
        "initializer_range": 0.2,
    }
    text.update(overrides.pop("text_config", {}))
    vision.update(overrides.pop("vision_config", {}))
    return BlipConfig(text_config=text, vision_config=vision, **overrides)


def make_blip(**overrides) -> BlipForQuestionAnswering:
    """A small random BLIP whose tokens differ from one another, as trained ones do."""
    torch.manual_seed(1)
    return BlipForQuestionAnswering(blip_config(**overrides)).eval()


@pytest.fixture
def blip():
    return make_blip()


@pytest.fixture
def model(blip):
    return MadtpBlipForQuestionAnswering.from_blip(blip, num_alignment_tokens=12)


def make_inputs(lengths=(9, 5, 7), seed=0, image_size=48) -> dict[str, torch.Tensor]:
    """Questions of the given lengths, padded on the right, an image for each of them, and answers."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(4, 38, (len(lengths), longest), generator=generator)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    # Images of different busyness, so that samples keep different numbers of tokens.
    scale = torch.linspace(0.3, 2.0, len(lengths))[:, None, None, None]
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "pixel_values": torch.randn(len(lengths), 3, image_size, image_size, generator=generator) * scale,
        "labels": torch.tensor([[38, 7, 9, 3]] * len(lengths)),
    }


def one_sample(inputs, index):
    """Row `index` of a batch, by itself and without padding."""
    length = int(inputs["attention_mask"][index].sum())
    sample = {name: value[index : index + 1] for name, value in inputs.items()}
    sample["input_ids"] = sample["input_ids"][:, :length]
    sample["attention_mask"] = sample["attention_mask"][:, :length]
    return sample


@pytest.fixture
def processor():
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "?"]
    pieces += [f"[unused{index}]" for index in range(38 - len(pieces))] + ["[DEC]", "[ENC]"]
    tokenizer = BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, bos_token="[DEC]")
    return BlipProcessor(BlipImageProcessor(size={"height": 48, "width": 48}), tokenizer)
