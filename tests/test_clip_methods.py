"""The pruning methods on CLIP's towers."""

import pytest
import torch

from madtp_hf import MadtpClipModel, calibrate
from madtp_hf.budgets.passes import measure
from madtp_hf.modeling.pruning_method import Decision, PruningMethod
from madtp_hf.modeling.token_pruning import merge_weights, most_important

from .conftest import close
from .helpers.clip import make_clip_inputs, make_clip_model


LENGTHS = (9, 5, 12, 7)
METHODS = {"tome": {"r": 6.5}, "evit": {"keep_rate": 0.6}, "random": {"keep_rate": 0.7}}


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_fixed_counts_prune_images_and_leave_texts(method, tmp_path):
    model, inputs = make_clip_model(), make_clip_inputs(LENGTHS)
    dense = model(**inputs)
    model.set_pruning_method(method)
    model.set_pruning(**METHODS[method])
    output = model(**inputs)
    assert (output.vision_tokens[-1] < output.vision_tokens[0]).all()
    assert (output.vision_tokens == output.vision_tokens[:, :1]).all()
    close(output.text_embeds, dense.text_embeds)
    assert not torch.allclose(output.image_embeds, dense.image_embeds, atol=1e-3)
    alone = model(**{name: value[:1] for name, value in inputs.items()})
    close(alone.image_embeds, output.image_embeds[:1])
    model.save_pretrained(tmp_path)
    loaded = MadtpClipModel.from_pretrained(tmp_path)
    close(loaded(**inputs).logits_per_text, output.logits_per_text, atol=1e-4)


@pytest.mark.parametrize("method", (*METHODS, "class_attention", "madtp_merge"))
@torch.no_grad()
def test_every_method_is_calibrated(method):
    model, inputs = make_clip_model(), make_clip_inputs((12,) * 12)
    model.set_pruning_method(method)
    calibrate(model, [inputs], [0.4])
    model.set_pruning(reduction=0.4)
    assert measure(model, inputs, model(**inputs)).mean().item() == pytest.approx(0.4, abs=0.01)


@torch.no_grad()
def test_class_attention_prunes_both_towers_otherwise_than_madtp(path):
    model, inputs = make_clip_model(), make_clip_inputs(LENGTHS)
    model.set_pruning(temperature=3.0)
    madtp = model(**inputs)
    model.set_pruning_method("class_attention")
    model.set_pruning(temperature=3.0)
    output = model(**inputs)
    for tokens in ("vision_tokens", "text_tokens"):
        assert (output[tokens][-1] <= output[tokens][0]).all() and (output[tokens][-1] < output[tokens][0]).any()
    assert torch.isfinite(output.logits_per_image).all()
    assert not torch.equal(output.logits_per_image, madtp.logits_per_image)


@pytest.mark.parametrize("lengths", [(12,) * 4, LENGTHS], ids=str)
@torch.no_grad()
def test_fused_attention_of_causal_texts_finds_what_a_method_needs(lengths):
    """Texts of equal length have no mask but the causal one."""

    class Half(PruningMethod):
        needs = "pooling_attention"

        def decide(self, layer, attention, scores, chunk):
            mask, count = self.spec.mask(chunk), self.spec.counts(chunk)
            number = torch.as_tensor(count * self.setting["keep_rate"]).long()
            stays = most_important(attention, number, mask)
            merges = stays.sum(dim=1, keepdim=True) < count
            return Decision(
                merge_weights(attention if mask is None else attention * mask, stays, merges), stays, merges
            )

    model, inputs = make_clip_model(), make_clip_inputs(lengths)
    with model.pruning(method=Half, keep_rate=0.5):
        together = model(**inputs)
        assert (together.text_tokens[-1] < together.text_tokens[0]).all()
        one = {n: v[:1, : lengths[0]] if v.ndim == 2 else v[:1] for n, v in inputs.items()}
        close(model(**one).text_embeds, together.text_embeds[:1], atol=1e-4)
