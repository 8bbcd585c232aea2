"""A host written from docs/adding_a_model.md alone: no class token, several protected tokens, everything works."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from madtp_hf.modeling import chunks
from madtp_hf.modeling.attention import BranchSpec
from madtp_hf.modeling.pruning_method import METHODS

from .conftest import close
from .helpers.kernel_standins import kernel_path


PAGE = Path(__file__).parents[1] / "docs" / "adding_a_model.md"
SETTINGS = {
    "madtp": {"temperature": 3.0},
    "madtp_merge": {"temperature": 3.0},
    "class_attention": {"temperature": 30.0},
    "evit": {"keep_rate": 0.5},
    "tome": {"r": 5},
    "random": {"keep_rate": 0.5},
}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names of a module that holds the page's code, without its last block, which uses it."""
    folder = tmp_path_factory.mktemp("host")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (folder / "tiny_host.py").write_text("\n\n".join(blocks[:-1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield vars(importlib.import_module("tiny_host"))
        patch.delitem(sys.modules, "tiny_host")


def make_model(page, **overrides):
    torch.manual_seed(0)
    return page["TinyModel"](page["TinyConfig"](num_alignment_tokens=5, **overrides)).eval()


def make_batch():
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(3, 3, 48, 48, generator=generator)
        * torch.tensor([0.5, 1, 2])[:, None, None, None],
        "input_ids": torch.randint(40, (3, 12), generator=generator),
        "attention_mask": (torch.arange(12) < torch.tensor([[12], [7], [9]])).long(),
        "labels": torch.tensor([0.0, 1.0, 2.0]),
    }


def one(batch, index):
    length = int(batch["attention_mask"][index].sum())
    return {n: v[index : index + 1, :length] if v.ndim == 2 else v[index : index + 1] for n, v in batch.items()}


def test_alignment_tokens_are_initialised(page, tmp_path):
    model = make_model(page)
    norms = model.alignment.tokens.norm(dim=1)
    assert norms.isfinite().all() and (norms[0] / norms[-1] > 20)  # graded norms, as BLIP's and CLIP's
    wide = make_model(page, alignment_dim=16)
    assert wide.alignment.vision_projection.weight.abs().sum() > 0
    # Loaded from a checkpoint without them, as a dense one, they are new as well.
    weights = {n: t for n, t in model.state_dict().items() if not n.startswith("alignment.")}
    model.config.save_pretrained(tmp_path)
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = page["TinyModel"].from_pretrained(tmp_path)
    norms = loaded.alignment.tokens.norm(dim=1)
    assert norms.isfinite().all() and (norms > 0).all() and (norms[0] / norms[-1] > 20)


@pytest.mark.parametrize("method", SETTINGS)
@torch.no_grad()
def test_a_sample_depends_neither_on_its_batch_nor_on_padding(page, method, path):
    model, batch = make_model(page), make_batch()
    model.set_pruning_method(method)
    model.set_pruning(**SETTINGS[method])
    together = model(**batch)
    assert (together.vision_tokens[-1] < 38).all()
    assert (together.text_tokens[-1] < together.text_tokens[0]).any() == ("text" in METHODS[method].modalities)
    if method == "random":
        return
    for index in range(3):
        alone = model(**one(batch, index))
        close(alone.logits, together.logits[index : index + 1], atol=1e-4)
        assert torch.equal(alone.vision_tokens[:, 0], together.vision_tokens[:, index])
        assert torch.equal(alone.text_tokens[:, 0], together.text_tokens[:, index])


@pytest.mark.parametrize("method", SETTINGS)
@torch.no_grad()
def test_protected_tokens_stay_where_they_are(page, method):
    model, batch = make_model(page), make_batch()
    model.set_pruning_method(method)
    model.set_pruning(**SETTINGS[method])
    positions = model(**batch, output_positions=True).vision_positions
    for layer in positions[1:]:
        assert (layer[:, :2] == torch.tensor([0, 1])).all() and not torch.isin(
            layer[:, 2:], torch.tensor([0, 1])
        ).any()


SPECS = {
    "nothing protected": BranchSpec(0, 0, "mean"),
    "three at the front, two at the end": BranchSpec(3, 2, "last"),
    "a query from outside": BranchSpec(1, 0, torch.randn(4, 8, generator=torch.Generator().manual_seed(0))),
}


@pytest.mark.parametrize("name", SPECS)
def test_other_specs(page, name, path, monkeypatch):
    monkeypatch.setitem(page, "IMAGES", SPECS[name])  # the page's functions read it
    model, batch = make_model(page), make_batch()
    model.branch_specs = {**model.branch_specs, "vision": SPECS[name]}
    model.set_pruning(temperature=3.0)
    output = model(**batch, output_positions=True)
    front, end = SPECS[name].num_prefix_tokens, SPECS[name].num_suffix_tokens
    for index, counts in enumerate(output.vision_tokens[-1]):
        kept = output.vision_positions[-1][index][:counts]
        assert kept[:front].tolist() == list(range(front))
        assert kept[len(kept) - end :].tolist() == list(range(38 - end, 38))
    for index in range(3):
        close(model(**one(batch, index)).logits, output.logits[index : index + 1], atol=1e-4)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_kernels_are_for_the_branches_that_they_know(page, monkeypatch):
    """One protected token at the front that pools; others take the plain path, with the same output."""
    called = []

    def call(function, names, *args):
        called.append(function.__name__)
        return function(*args)

    for spec, known in ((page["IMAGES"], False), (BranchSpec(), True), (BranchSpec(pooling="mean"), False)):
        monkeypatch.setitem(page, "IMAGES", spec)
        model, batch = make_model(page), make_batch()
        model.branch_specs = {"vision": spec, "text": page["TEXTS"]}
        for layer in (*model.vision_model.layers, *model.text_model.layers):
            layer.heads = 2  # of width 16, the least that kernels take
        model.set_pruning(temperature=3.0)
        monkeypatch.setattr(chunks, "CPU_TAKES_CHUNKS", False)
        expected = model(**batch)
        called.clear()
        with kernel_path(call):
            found = model(**batch)
        close(found.logits, expected.logits, atol=1e-4)
        assert ("gate" in called) == known


def test_it_trains_and_is_saved(page, tmp_path):
    model, batch = make_model(page).train(), make_batch()
    model.set_pruning(temperature=3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(**batch).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.alignment.tokens.grad.abs().sum() > 0
    optimizer.step()
    model.eval().save_pretrained(tmp_path, safe_serialization=True)
    loaded = page["TinyModel"].from_pretrained(tmp_path).eval()
    with torch.no_grad():
        close(loaded(**batch).logits, model(**batch).logits)
    assert loaded.config.pruning_setting == model.config.pruning_setting
