"""What a user of the question answering model relies on."""

import pytest
import torch
from transformers import BlipForConditionalGeneration

from madtp_hf import MadtpBlipConfig, MadtpBlipForQuestionAnswering

from .conftest import blip_config, make_blip, make_inputs, one_sample


TEMPERATURES = (0.3, 3.0, 30.0)


# Pruning off


@pytest.mark.parametrize("layers", [(4, 3), (2, 5)])
def test_pruning_off_is_transformers_blip(layers):
    blip = make_blip(vision_config={"num_hidden_layers": layers[0]}, text_config={"num_hidden_layers": layers[1]})
    model = MadtpBlipForQuestionAnswering.from_blip(blip)
    inputs = make_inputs()
    with torch.no_grad():
        expected = blip(**inputs, output_hidden_states=True)
        decoder = blip.text_decoder(
            input_ids=inputs["labels"],
            encoder_hidden_states=blip.text_encoder(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                encoder_hidden_states=expected.image_embeds,
            ).last_hidden_state,
        )
        output = model(**inputs, output_hidden_states=True)
    for name in ("loss", "image_embeds", "last_hidden_state"):
        torch.testing.assert_close(output[name], expected[name], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.logits, decoder.logits, atol=1e-5, rtol=0)
    for mine, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert output.task_loss == output.loss and output.alignment_loss == 0
    assert (output.vision_tokens == 37).all() and output.vision_tokens.shape == (layers[0] + 1, 3)
    assert output.text_tokens.tolist() == [[9, 5, 7]] * (layers[1] + 1)


@pytest.mark.parametrize("lengths", [(7, 7, 7), (9, 3, 7)])
def test_pruning_off_generates_what_transformers_blip_generates(blip, model, lengths):
    inputs = make_inputs(lengths)
    inputs.pop("labels")
    for settings in ({"max_new_tokens": 6}, {"max_new_tokens": 6, "num_beams": 3}):
        assert torch.equal(model.generate(**inputs, **settings), blip.generate(**inputs, **settings))
    scores = [
        m.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True, output_scores=True).scores
        for m in (model, blip)
    ]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=0)


def test_pruning_off_the_side_of_padding_does_not_matter(model):
    inputs = make_inputs(lengths=(9, 5))
    left = {**inputs, "input_ids": inputs["input_ids"].clone(), "attention_mask": inputs["attention_mask"].flip(1)}
    left["input_ids"][1] = left["input_ids"][1].roll(4)
    with torch.no_grad():
        torch.testing.assert_close(model(**left).logits, model(**inputs).logits)


def test_larger_images_with_interpolated_positions(blip, model):
    inputs = make_inputs(image_size=64)
    with torch.no_grad():
        expected = blip(**inputs, interpolate_pos_encoding=True)
        output = model(**inputs, interpolate_pos_encoding=True)
    torch.testing.assert_close(output.image_embeds, expected.image_embeds, atol=1e-5, rtol=0)


def test_a_tuple_on_request(model):
    inputs = make_inputs()
    with torch.no_grad():
        loss, image_embeds, *_ = model(**inputs, return_dict=False)
        output = model(**inputs)
    assert loss == output.loss and torch.equal(image_embeds, output.image_embeds)


# Pruning on


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_an_output_does_not_depend_on_its_batch(model, temperature):
    inputs = make_inputs(lengths=(9, 3, 7, 16, 5, 2, 12, 8), seed=4)
    model.set_pruning(temperature=temperature)
    with torch.no_grad():
        together = model(**inputs)
        generated = model.generate(**{k: v for k, v in inputs.items() if k != "labels"}, max_new_tokens=5)
    assert len(set(together.vision_tokens[-1].tolist())) > 1  # the samples do differ
    for index in range(8):
        sample = one_sample(inputs, index)
        with torch.no_grad():
            alone = model(**sample)
            sample.pop("labels")
            alone_generated = model.generate(**sample, max_new_tokens=5)
        assert torch.equal(alone.vision_tokens[:, 0], together.vision_tokens[:, index])
        assert torch.equal(alone.text_tokens[:, 0], together.text_tokens[:, index])
        torch.testing.assert_close(alone.logits[0], together.logits[index], atol=1e-4, rtol=0)
        length = alone_generated.shape[1]
        assert torch.equal(alone_generated[0], generated[index, :length])
        assert (generated[index, length:] == 0).all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("granularity", ["instance", "batch"])
def test_neither_side_nor_length_of_padding_matters(model, temperature, granularity):
    inputs = make_inputs(lengths=(9, 5, 7))
    model.set_pruning(temperature=temperature)
    model.config.pruning_granularity = granularity
    left = {**inputs, "input_ids": inputs["input_ids"].clone(), "attention_mask": inputs["attention_mask"].flip(1)}
    for row, length in enumerate((9, 5, 7)):
        left["input_ids"][row] = left["input_ids"][row].roll(9 - length)
    longer = dict(inputs)
    for name, value in (("input_ids", 17), ("attention_mask", 0)):
        longer[name] = torch.nn.functional.pad(inputs[name], (0, 6), value=value)
    answers = {"answer_input_ids": torch.tensor([[2, 7, 3], [2, 8, 3], [2, 9, 3]]), "answer_attention_mask": None}
    with torch.no_grad():
        expected = model(**inputs)
        for variant in (left, longer):
            output = model(**variant)
            assert torch.equal(output.vision_tokens, expected.vision_tokens)
            assert torch.equal(output.text_tokens, expected.text_tokens)
            for name in ("loss", "logits", "alignment_loss", "image_embeds", "question_states"):
                torch.testing.assert_close(output[name], expected[name], atol=1e-5, rtol=0)
            same = [{k: v for k, v in batch.items() if k != "labels"} for batch in (variant, inputs)]
            assert torch.equal(*(model.generate(**batch, max_new_tokens=5) for batch in same))
            assert torch.equal(*(model.rank_answers(**batch, **answers) for batch in same))


def test_token_counts_say_what_the_outputs_hold(model):
    inputs = make_inputs()
    model.set_pruning(temperature=3.0)
    with torch.no_grad():
        output = model(**inputs, output_positions=True)
    assert output.vision_tokens.dtype == output.text_tokens.dtype == torch.int64
    assert output.vision_tokens[0].tolist() == [37] * 3 and output.text_tokens[0].tolist() == [9, 5, 7]
    assert (output.vision_tokens.diff(dim=0) <= 0).all() and (output.vision_tokens[-1] < 37).all()
    assert torch.equal(output.image_mask.sum(1), output.vision_tokens[-1])
    question_lengths = torch.full((3,), output.question_states.shape[1])
    if output.question_mask is not None:
        question_lengths = output.question_mask.sum(1)
    assert torch.equal(question_lengths, output.text_tokens[-1])
    # Positions: the class token first, patches in order, each at most once; with the merged token they make up the count.
    for layer, positions in enumerate(output.vision_positions[1:], start=1):
        for row, count in zip(positions, output.vision_tokens[layer]):
            kept = row[row >= 0]
            assert kept[0] == 0 and (kept.diff() > 0).all() and len(kept) <= count


def test_only_the_modalities_that_are_asked_for_prune(blip):
    for modalities in (("vision",), ("text",)):
        model = MadtpBlipForQuestionAnswering.from_blip(
            blip, num_alignment_tokens=12, pruning_modalities=modalities, pruning_temperature=30.0
        )
        with torch.no_grad():
            output = model(**make_inputs(lengths=(12, 12)))
        assert (output.vision_tokens[-1] < output.vision_tokens[0]).all() == ("vision" in modalities)
        assert (output.text_tokens[-1] < output.text_tokens[0]).all() == ("text" in modalities)
        assert output.alignment_loss > 0


def test_batch_granularity_keeps_as_many_in_every_sample(model):
    model.config.pruning_granularity = "batch"
    model.set_pruning(temperature=3.0)
    with torch.no_grad():
        output = model(**make_inputs(lengths=(7, 7, 7)))
    assert (output.vision_tokens == output.vision_tokens[:, :1]).all() and output.image_mask is None


def test_branches_of_different_widths_are_mapped_to_the_alignment_width():
    fields = blip_config(vision_config={"hidden_size": 48, "num_attention_heads": 6}).to_dict()
    fields.pop("model_type")
    wide = MadtpBlipForQuestionAnswering(MadtpBlipConfig(**fields, num_alignment_tokens=12))
    assert wide.alignment.vision_projection.weight.shape == (32, 48) and wide.alignment.text_projection is None
    wide.set_pruning(temperature=3.0)
    output = wide(**make_inputs())
    output.loss.backward()
    assert (output.vision_tokens[-1] < 37).any()
    assert wide.alignment.vision_projection.weight.grad.abs().max() > 0


def test_the_encoder_token_takes_the_place_of_the_first(blip, model):
    with_token = MadtpBlipForQuestionAnswering.from_blip(blip, encoder_token_id=39, num_alignment_tokens=12)
    inputs = make_inputs()
    replaced = {**inputs, "input_ids": inputs["input_ids"].clone()}
    replaced["input_ids"][:, 0] = 39
    with torch.no_grad():
        torch.testing.assert_close(with_token(**inputs).logits, model(**replaced).logits)
    assert inputs["input_ids"][0, 0] != 39  # the caller's tensor is its own


# Ranking answers


@pytest.mark.parametrize("temperature", (0.0, 3.0))
@pytest.mark.parametrize("k", (3, 128))
def test_ranked_answers_are_those_of_scoring_each_answer_on_its_own(model, temperature, k):
    model.set_pruning(temperature=temperature)
    inputs = make_inputs()
    inputs.pop("labels")
    answers = [[2, 7, 3], [2, 11, 12, 3], [2, 13, 3], [2, 14, 15, 16, 3], [2, 7, 20, 3], [2, 30, 3]]
    longest = max(map(len, answers))
    ids = torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers])
    mask = torch.tensor([[1] * len(answer) + [0] * (longest - len(answer)) for answer in answers])
    chosen = model.rank_answers(**inputs, answer_input_ids=ids, answer_attention_mask=mask, k=k)
    for row in range(3):
        sample = one_sample(inputs, row)
        firsts, totals = [], []
        for answer in answers:
            labels = torch.tensor([[38, *answer[1:]]])
            with torch.no_grad():
                log_probs = model(**sample, labels=labels).logits.log_softmax(-1)[0]
            firsts.append(log_probs[0, answer[1]].item())
            totals.append(sum(log_probs[i, token].item() for i, token in enumerate(answer[1:])))
        shortlist = sorted(range(len(answers)), key=lambda i: -firsts[i])[:k]
        assert chosen[row] == max(shortlist, key=lambda i: totals[i])


def test_answers_to_rank_are_checked(model):
    inputs = make_inputs()
    inputs.pop("labels")
    for answers, message in (
        (torch.tensor([[2, 7, 9, 3], [2, 0, 0, 0]]), "answers of 1 to 4 tokens"),
        (torch.full((2, 30), 7), "at most 24"),
    ):
        with pytest.raises(ValueError, match=message):
            model.rank_answers(**inputs, answer_input_ids=answers)


def test_settings_changed_by_hand_are_checked(model):
    for field, value in (("pruning_granularity", "sample"), ("pruning_modalities", ("audio",))):
        before = getattr(model.config, field)
        setattr(model.config, field, value)
        with pytest.raises(ValueError, match=field):
            model(**make_inputs())
        setattr(model.config, field, before)


# Training


@pytest.mark.parametrize("temperature", (0.0, 3.0))
@pytest.mark.parametrize("checkpointing", (False, True))
def test_every_parameter_gets_a_gradient_in_every_step(model, temperature, checkpointing):
    model.set_pruning(temperature=temperature)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    output = model(**make_inputs())
    output.loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    assert (model.alignment.tokens.grad.abs().max() > 0) == (temperature > 0)
    torch.testing.assert_close(output.loss, output.task_loss + 0.1 * output.alignment_loss)


@pytest.mark.parametrize("reentrant", (False, True))
def test_gradient_checkpointing_changes_no_gradient(model, reentrant):
    model.set_pruning(temperature=3.0)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(**make_inputs()).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_trains_close_to_float32(model, dtype):
    model.set_pruning(temperature=3.0)
    inputs = make_inputs()
    exact = model(**inputs).loss
    with torch.autocast("cpu", dtype=dtype):
        loss = model(**inputs).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert abs(loss - exact) < 0.1 * abs(exact)


def test_bfloat16_weights(model):
    model.set_pruning(temperature=3.0)
    inputs = make_inputs()
    exact = model(**inputs).loss
    model = model.to(torch.bfloat16)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    output = model(**inputs)
    assert output.logits.dtype == torch.bfloat16 and abs(output.loss - exact) < 0.1 * abs(exact)
    inputs.pop("labels")
    assert model.generate(**inputs, max_new_tokens=3).shape[0] == 3


def test_small_temperatures_prune_in_float16_as_in_float32(model):
    model.set_pruning(temperature=1e-5)
    inputs = make_inputs()
    with torch.no_grad():
        expected = model(**inputs).vision_tokens
        with torch.autocast("cpu", dtype=torch.float16):
            counts = model(**inputs).vision_tokens
    assert (expected[-1] < 37).all() and (counts[-1] < 37).all()


def test_labels_at_minus_100_count_in_no_loss(model):
    inputs = make_inputs(lengths=(7, 7))
    padded = {**inputs, "labels": torch.nn.functional.pad(inputs["labels"], (0, 3), value=-100)}
    torch.testing.assert_close(model(**padded).loss, model(**inputs).loss)


# Bad input


def swap(inputs, **changes):
    return {**inputs, **changes}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda i: swap(i, pixel_values=i["pixel_values"][:, :1]), r"\(3, 1, 48, 48\).*expected \(batch_size, 3"),
        (lambda i: swap(i, pixel_values=torch.zeros(3, 3, 40, 48)), "40 x 48 pixels.*takes 48 x 48"),
        (lambda i: swap(i, pixel_values=i["pixel_values"][:2]), "3 questions and pixel_values 2 images"),
        (lambda i: swap(i, labels=i["labels"][:2]), "2 answers for 3 questions"),
        (lambda i: swap(i, attention_mask=i["attention_mask"][:, :4]), r"\(3, 4\) and input_ids \(3, 9\)"),
        (
            lambda i: swap(i, attention_mask=i["attention_mask"] * torch.tensor([[1], [0], [1]])),
            r"0 everywhere in row \[1\]",
        ),
        (lambda i: swap(make_inputs((9, 25, 7))), "25 tokens.*at most 24.*truncation=True"),
        (lambda i: swap(i, labels=None), "Neither labels nor decoder_input_ids"),
        (lambda i: swap(i, output_attentions=True), "keeps no attention maps"),
    ],
)
def test_bad_input_is_named(model, change, message):
    with pytest.raises(ValueError, match=message):
        model(**change(make_inputs()))


def test_only_the_real_tokens_of_a_question_need_to_fit(model):
    model.set_pruning(temperature=3.0)
    inputs = make_inputs()
    expected = model(**inputs).logits
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, 40))
    torch.testing.assert_close(model(**inputs).logits, expected)


@pytest.mark.parametrize("temperature", (-1.0, float("nan"), float("inf"), "high", True))
def test_a_bad_temperature_leaves_the_model_as_it_was(model, temperature):
    model.set_pruning(temperature=2.0)
    with pytest.raises(ValueError, match="pruning_temperature"):
        model.set_pruning(temperature=temperature)
    assert model.config.pruning_temperature == 2.0


def test_set_pruning(model):
    model.set_pruning(temperature=2.0)
    for reduction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"expected a number in \[0, 1\)"):
            model.set_pruning(reduction=reduction)
    with pytest.raises(ValueError, match="calibrate"):
        model.set_pruning(reduction=0.5)
    with pytest.raises(ValueError, match="one of them"):
        model.set_pruning(temperature=1.0, reduction=0.5)
    model.config.pruning_schedule = [[0.4, 1.0], [0.6, 4.0]]
    with pytest.raises(ValueError, match=r"0\.4 to 0\.6"):
        model.set_pruning(reduction=0.7)
    assert model.config.pruning_temperature == 2.0
    for reduction, temperature in ((0.4, 1.0), (0.5, 2.0), (0.6, 4.0), (0, 0.0)):
        model.set_pruning(reduction=reduction)
        assert model.config.pruning_temperature == pytest.approx(temperature)
    model.config.pruning_schedule = [[0.4, 1.0]]
    model.set_pruning(reduction=0.4)
    assert model.config.pruning_temperature == 1.0
    model.set_pruning(None)
    assert model.config.pruning_temperature == 0.0


# From BLIP


def test_from_blip_copies(blip, tmp_path):
    blip.save_pretrained(tmp_path)
    inputs = make_inputs()
    for source in (blip, str(tmp_path)):
        model = MadtpBlipForQuestionAnswering.from_blip(source, num_alignment_tokens=7)
        assert model.alignment.tokens.shape == (7, 32)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).loss, blip(**inputs).loss)
        new = set(model.state_dict()) - set(blip.state_dict())
        assert new == {"alignment.tokens"}
    with torch.no_grad():
        model.vision_model.post_layernorm.weight.zero_()
    assert blip.vision_model.post_layernorm.weight.abs().min() > 0


def test_from_blip_names_what_does_not_fit(blip, tmp_path):
    captioning = BlipForConditionalGeneration(blip_config())
    captioning.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint of a BlipForQuestionAnswering"):
        MadtpBlipForQuestionAnswering.from_blip(tmp_path)
    with pytest.raises(
        TypeError, match="got a BlipForConditionalGeneration: expected a BlipForQuestionAnswering or a "
    ):
        MadtpBlipForQuestionAnswering.from_blip(captioning)
    with pytest.raises(TypeError, match="prunning_temperature"):
        MadtpBlipForQuestionAnswering.from_blip(blip, prunning_temperature=1.0)
