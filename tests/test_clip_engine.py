"""What runs below CLIP: kernels' path, folded alignment maps, offloaded weights, other methods."""

import pytest
import torch

from madtp_hf import MadtpClipModel
from madtp_hf.modeling.pruning_method import Decision, PruningMethod

from .conftest import close
from .helpers.clip import make_clip_inputs, make_clip_model
from .helpers.devices import no_default_device
from .test_kernel_path import run_on_kernel_path


LENGTHS = (16, 3, 9, 12)
WIDE_HEADS = {"num_attention_heads": 2, "hidden_size": 32}  # of 16, the least that the kernels take


def pruned(temperature=3.0, config_overrides=None, **overrides):
    model = make_clip_model(config_overrides, **overrides)
    model.set_pruning(temperature=temperature)
    return model


@pytest.mark.parametrize(
    ("method", "temperature"), [("madtp", 0.3), ("madtp", 3.0), ("madtp", 30.0), ("madtp_merge", 3.0)]
)
@torch.no_grad()
def test_kernels_give_the_same_output(method, temperature):
    model, inputs = pruned(temperature, text_config=WIDE_HEADS, vision_config=WIDE_HEADS), make_clip_inputs(LENGTHS)
    model.set_pruning_method(method)
    model.set_pruning(temperature=temperature)
    expected = model(**inputs, output_positions=True)
    found, called = run_on_kernel_path(model, inputs)
    for name in ("vision_tokens", "text_tokens"):
        assert torch.equal(found[name], expected[name])
    for name in ("text_embeds", "image_embeds"):
        close(found[name], expected[name], atol=1e-4)
    decides = {"gate", "merge"} if method == "madtp" else {"gate_and_assign", "merge_similar"}
    assert {"scored_varlen_attention"} | decides <= set(called)
    assert (expected.text_tokens[-1] < expected.text_tokens[0]).any()


@torch.no_grad()
def test_folded_maps_are_kept_until_a_parameter_changes():
    model, inputs = pruned(), make_clip_inputs()
    plain = pruned()
    model.prepare_for_inference("float32")
    for change in (
        lambda _: None,
        lambda model: model.alignment.tokens.mul_(0.3),
        lambda model: model.alignment.vision_projection[1].weight.mul_(-2.0),
        lambda model: model.alignment.text_projection[0].bias.add_(0.5),
        lambda model: model.load_state_dict(make_clip_model({"num_alignment_tokens": 12}).state_dict()),
        lambda model: model.double().float(),
    ):
        torch.manual_seed(5)
        change(model)
        torch.manual_seed(5)
        change(plain)
        for _ in range(2):
            mine, theirs = model(**inputs), plain(**inputs)
            assert torch.equal(mine.vision_tokens, theirs.vision_tokens)
            close(mine.logits_per_text, theirs.logits_per_text, atol=1e-4)
    projection = model.alignment.vision_projection[0]
    first = projection(alignment_tokens=model.alignment.tokens)
    assert projection(alignment_tokens=model.alignment.tokens)[0] is first[0]
    model.prepare_for_inference(None)
    assert projection(alignment_tokens=model.alignment.tokens)[0] is not first[0]


@torch.no_grad()
def test_offloaded_weights():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = pruned(), make_clip_inputs()
    expected = model(**inputs)
    offloaded = accelerate.cpu_offload(pruned(), execution_device=torch.device("cpu"))
    assert offloaded.alignment.tokens.device.type == "meta"
    close(offloaded(**inputs).logits_per_text, expected.logits_per_text)


@pytest.mark.parametrize("temperature", (0.0, 3.0))
def test_nothing_is_made_on_the_default_device(temperature, device_path):
    model, inputs = pruned(temperature), make_clip_inputs()
    with no_default_device():
        model(**inputs, return_loss=True).loss.backward()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@torch.no_grad()
def test_half_precision(dtype, tmp_path):
    model, inputs = pruned(), make_clip_inputs()
    model.save_pretrained(tmp_path)
    half = MadtpClipModel.from_pretrained(tmp_path, dtype=dtype)
    output = half(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)})
    assert output.text_embeds.dtype == dtype
    similarity = torch.nn.functional.cosine_similarity(output.image_embeds.float(), model(**inputs).image_embeds)
    assert (similarity > 0.9).all()


class EveryOther(PruningMethod):
    """Drops every other word of those that can go, without a trace."""

    modalities = ("text",)
    has_fixed_counts = True

    def prunes(self, layer, sequences):
        return True

    def decide(self, layer, statistics, scores, chunk):
        stays = torch.arange(self.spec.num_removable(chunk)).expand(chunk.batch_size, -1) % 2 == 0
        real = self.spec.mask(chunk)
        stays = stays if real is None else stays & real
        merges = torch.zeros(chunk.batch_size, 1, dtype=torch.bool)
        return Decision(torch.zeros_like(stays, dtype=torch.float32), stays, merges)


@torch.no_grad()
def test_another_method_keeps_the_end_of_text(path):
    model, inputs = pruned(), make_clip_inputs(LENGTHS)
    with model.pruning(method=EveryOther, keep_rate=0.5):
        output = model(**inputs)
        ends = model._encode_text(inputs["input_ids"], output_positions=True).positions[-1]
    expected = torch.tensor(LENGTHS)
    for counts in output.text_tokens[1:]:
        expected = 2 + (expected - 2 + 1) // 2
        assert torch.equal(counts, expected)
    assert [row[row >= 0][-1].item() for row in ends] == [length - 1 for length in LENGTHS]
