import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
)

from madtp_hf import (
    MadtpBlipForConditionalGeneration,
    MadtpBlipForImagesAndTextClassification,
    MadtpBlipForImageTextRetrieval,
    MadtpBlipForQuestionAnswering,
)
from madtp_hf.modeling import chunks

from .helpers.loopback_hub import LoopbackHub


os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # the models are small: more threads would only wait for each other
WORDS = "is there a seven three how many sevens are which digit leftmost yes no".split()
WORDS += "one two what color red of the image".split()

TEMPERATURES = (0.3, 3.0, 30.0)
LENGTHS = (9, 3, 7, 16, 5, 4, 12, 8)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu path", "device path"])
def path(request, monkeypatch):
    """Run a test twice: on the CPU's path, part by part, and on other devices' path, all at once."""
    monkeypatch.setattr(chunks, "CPU_TAKES_CHUNKS", request.param == "cpu path")
    return request.param


@pytest.fixture
def device_path(monkeypatch):
    """Use the path of other devices on the CPU."""
    monkeypatch.setattr(chunks, "CPU_TAKES_CHUNKS", False)


def close(mine, theirs, atol=1e-5):
    torch.testing.assert_close(mine, theirs, atol=atol, rtol=0)


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
    """Build a small random BLIP whose tokens differ from one another, as in trained models."""
    torch.manual_seed(1)
    return BlipForQuestionAnswering(blip_config(**overrides)).eval()


@pytest.fixture
def blip():
    return make_blip()


@pytest.fixture
def model(blip):
    return MadtpBlipForQuestionAnswering.from_blip(blip, num_alignment_tokens=12)


def make_inputs(lengths=(9, 5, 7), seed=0, image_size=48) -> dict[str, torch.Tensor]:
    """Return questions of the given lengths, padded on the right, an image for each of them, and answers."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(4, 38, (len(lengths), longest), generator=generator)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    # Images of different contrast, so that samples keep different token counts.
    scale = torch.linspace(0.3, 2.0, len(lengths))[:, None, None, None]
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "pixel_values": torch.randn(len(lengths), 3, image_size, image_size, generator=generator) * scale,
        "labels": torch.tensor([[38, 7, 9, 3]] * len(lengths)),
    }


def one_sample(inputs, index, sequences=("input_ids", "attention_mask")):
    """Return row `index` of a batch alone, without the padding of its `sequences`."""
    length = int(inputs["attention_mask"][index].sum())
    sample = {name: value[index : index + 1] for name, value in inputs.items()}
    for name in sequences:
        sample[name] = sample[name][:, :length]
    return sample


# The same for each of the four tasks


def make_caption_inputs(lengths=(9, 5, 7), seed=0, image_size=48) -> dict[str, torch.Tensor]:
    """Return captions that begin with the start token; the word after it is a prompt, which is not learned."""
    inputs = make_inputs(lengths, seed, image_size)
    inputs["input_ids"][:, 0] = 38
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :2] = -100
    return {**inputs, "labels": labels}


def make_pair_inputs(lengths=(9, 5, 7), seed=0, image_size=48) -> dict[str, torch.Tensor]:
    """Return sentences about two images; the higher the left image's contrast, the lower the right one's."""
    inputs = make_inputs(lengths, seed, image_size)
    right = make_inputs(lengths, seed + 100, image_size)["pixel_values"].flip(0)
    inputs["pixel_values"] = torch.stack([inputs["pixel_values"], right], dim=1)
    return {**inputs, "labels": torch.arange(len(lengths)) % 2}


def make_retrieval_inputs(lengths=(9, 5, 7), seed=0, image_size=48) -> dict[str, torch.Tensor]:
    inputs = make_inputs(lengths, seed, image_size)
    inputs.pop("labels")
    return inputs


class Task(NamedTuple):
    model_class: type
    blip_class: type  # transformers' model that ours is made from
    make_inputs: Callable
    scores: str  # the output from which an answer is read
    to_train: dict = {}  # additional arguments with which `forward` returns a loss
    sequences: tuple = ("input_ids", "attention_mask")  # the inputs with the text's length


TASKS = {
    "vqa": Task(MadtpBlipForQuestionAnswering, BlipForQuestionAnswering, make_inputs, "logits"),
    "captioning": Task(
        MadtpBlipForConditionalGeneration,
        BlipForConditionalGeneration,
        make_caption_inputs,
        "logits",
        sequences=("input_ids", "attention_mask", "labels"),
    ),
    "nlvr2": Task(MadtpBlipForImagesAndTextClassification, BlipForImageTextRetrieval, make_pair_inputs, "logits"),
    "retrieval": Task(
        MadtpBlipForImageTextRetrieval,
        BlipForImageTextRetrieval,
        make_retrieval_inputs,
        "itm_score",
        {"return_loss": True},
    ),
}


def padded_otherwise(inputs, task):
    """Return the inputs with padding on the left of the texts, and with more padding on the right.

    For captions, only the latter.
    """
    names = TASKS[task].sequences
    lengths = inputs["attention_mask"].sum(1).tolist()
    left, longer = dict(inputs), dict(inputs)
    for name in names:
        left[name] = torch.stack([row.roll(len(row) - length) for row, length in zip(inputs[name], lengths)])
        value = {"input_ids": 17, "attention_mask": 0, "labels": -100}[name]
        longer[name] = torch.nn.functional.pad(inputs[name], (0, 6), value=value)
    return [longer] if task == "captioning" else [left, longer]


def make_task_blip(task, **overrides):
    """Build transformers' BLIP for a task, small and random."""
    torch.manual_seed(1)
    return TASKS[task].blip_class(blip_config(initializer_range=0.2, **overrides)).eval()


def make_task_model(task, config_overrides=None, **overrides):
    """Build a small random model of ours; for NLVR2, the parts that transformers' BLIP lacks are random as well."""
    blip = make_task_blip(task, **overrides)
    model = TASKS[task].model_class.from_blip(blip, **{"num_alignment_tokens": 12, **(config_overrides or {})})
    if task == "nlvr2":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "crossattention" in name or "cls_head" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def make_processor() -> BlipProcessor:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "?"]
    pieces += [f"[unused{index}]" for index in range(38 - len(pieces))] + ["[DEC]", "[ENC]"]
    tokenizer = BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, bos_token="[DEC]")
    return BlipProcessor(BlipImageProcessor(size={"height": 48, "width": 48}), tokenizer)


@pytest.fixture
def processor():
    return make_processor()


@pytest.fixture(scope="session", autouse=True)
def modules_cache(tmp_path_factory):
    """Keep the code of loaded checkpoints in one folder for all tests: Python looks where it found the first."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)  # before the user's own, which an import may have added already
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            patch.delitem(sys.modules, name)
        yield


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Start a local hub that huggingface_hub, in this process, uses as the real one.

    No token is stored: pass `token="hf_alice"`.
    """
    from huggingface_hub import constants

    hub = LoopbackHub({"hf_alice": ("alice", "org"), "hf_bob": ("bob",)})
    hub.start()
    home = tmp_path / "hub-home"
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # holds the endpoint of its creation
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)  # peft uses it to check whether a file exists
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield hub
    hub.stop()
