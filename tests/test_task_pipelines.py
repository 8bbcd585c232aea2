"""The pipelines of captioning, visual reasoning and retrieval: what they answer, in batches and one by one."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.utils.logging import warning_once

from .conftest import make_processor, make_task_model


PROMPTS = ["the", "what color is the three of the", "a seven"]


def picture(seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 70, 3), dtype=np.uint8))


IMAGES = [picture(seed) for seed in range(3)]


def as_pipeline(task):
    model = make_task_model(task)
    model.set_pruning(temperature=3.0)
    return model.as_pipeline(make_processor())


@pytest.fixture(scope="module")
def caption():
    return as_pipeline("captioning")


@pytest.fixture(scope="module")
def judge():
    return as_pipeline("nlvr2")


@pytest.fixture(scope="module")
def match():
    return as_pipeline("retrieval")


@pytest.fixture(scope="module")
def stock(caption):
    """transformers' own pipeline with the same model."""
    return pipeline("image-text-to-text", model=caption.model, processor=make_processor())


def numbers(found) -> list[float]:
    """The scores and similarities in an answer, whatever its form."""
    if isinstance(found, dict):
        return [value for value in found.values() if isinstance(value, float)]
    return [number for item in found for number in numbers(item)]


# Captioning


def test_a_caption_needs_no_prompt(caption, tmp_path):
    IMAGES[0].save(tmp_path / "image.png")
    expected = caption(IMAGES[0])
    assert set(expected[0]) == {"generated_text"} and expected[0]["generated_text"]
    for given in (tmp_path / "image.png", {"image": IMAGES[0]}, {"image": IMAGES[0], "prompt": ""}):
        assert caption(given) == expected
    one_by_one = [caption(image) for image in IMAGES]
    for given in (IMAGES, tuple(IMAGES), [{"image": image} for image in IMAGES], {"image": IMAGES}, iter(IMAGES)):
        assert list(caption(given, batch_size=3)) == one_by_one


def test_one_prompt_for_many_images_and_one_for_each(caption):
    together = caption(IMAGES, prompt=PROMPTS[1], batch_size=2, max_new_tokens=8)
    assert together == [caption(image, prompt=PROMPTS[1], max_new_tokens=8) for image in IMAGES]
    assert all(found[0]["generated_text"].startswith(PROMPTS[1]) for found in together)
    one_by_one = [caption(image, prompt=prompt, max_new_tokens=8) for image, prompt in zip(IMAGES, PROMPTS)]
    assert caption(IMAGES, prompt=PROMPTS, batch_size=3, max_new_tokens=8) == one_by_one
    assert one_by_one != [caption(image, max_new_tokens=8) for image in IMAGES]


def test_several_captions_of_an_image(caption):
    options = {"generate_kwargs": {"num_beams": 3, "num_return_sequences": 3}, "max_new_tokens": 5}
    found = caption(IMAGES[:2], batch_size=2, **options)
    assert [len(of_image) for of_image in found] == [3, 3]
    assert found == [caption(image, **options) for image in IMAGES[:2]]


@pytest.mark.parametrize("beams", (1, 3))
@pytest.mark.parametrize("side", ("right", "left"))
def test_prompts_of_unlike_length_are_continued_as_one_by_one(caption, side, beams):
    model, tokenizer = caption.model, make_processor().tokenizer
    read = tokenizer(PROMPTS, padding=True, padding_side=side, return_tensors="pt")
    pixel_values = caption.image_processor(images=IMAGES, return_tensors="pt").pixel_values
    options = {"max_new_tokens": 6, "num_beams": beams}
    together = model.generate(pixel_values, read.input_ids, read.attention_mask, **options)
    pad = model.config.text_config.pad_token_id
    for row, (prompt, image) in enumerate(zip(PROMPTS, pixel_values)):
        alone = model.generate(image[None], tokenizer(prompt, return_tensors="pt").input_ids, **options)[0].tolist()
        found = together[row].tolist()
        assert [token for token in found if token != pad] == [token for token in alone if token != pad]


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
def test_padding_in_front_of_a_prompt_changes_no_score(attention):
    """Not by the tokens alone: those could be the same by chance."""
    model = make_task_model("captioning")
    model.set_attn_implementation(attention)
    pixel_values = torch.randn(2, 3, 48, 48)
    ids = torch.tensor([[2, 7, 3, 0, 0, 0], [2, 7, 8, 9, 10, 3]])
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True, "min_new_tokens": 4}
    together = model.generate(pixel_values, ids, (ids > 0).long(), **options)
    alone = model.generate(pixel_values[:1], ids[:1, :3], **options)
    for mine, theirs in zip(together.logits, alone.logits):
        torch.testing.assert_close(mine[:1], theirs, atol=1e-4, rtol=1e-4)


def test_transformers_own_pipeline_takes_prompts(caption, stock):
    assert (
        stock(IMAGES[0], text="", max_new_tokens=12)[0]["generated_text"]
        == caption(IMAGES[0], max_new_tokens=12)[0]["generated_text"]
    )
    expected = [caption(image, prompt=PROMPTS[1], max_new_tokens=12)[0]["generated_text"] for image in IMAGES]
    found = stock(images=IMAGES, text=PROMPTS[1], max_new_tokens=12, return_full_text=False)  # one text for all
    assert [PROMPTS[1] + one["generated_text"] for one in found] == expected
    expected = [
        caption(image, prompt=prompt, max_new_tokens=12)[0]["generated_text"] for image, prompt in zip(IMAGES, PROMPTS)
    ]
    found = stock(images=IMAGES, text=PROMPTS, max_new_tokens=12)
    assert [one["generated_text"] for one in found] == expected
    asked = [{"images": image, "text": prompt} for image, prompt in zip(IMAGES, PROMPTS)]
    for batch_size in (1, 3):
        found = stock((row for row in asked), max_new_tokens=12, batch_size=batch_size)
        assert [one[0]["generated_text"] for one in found] == expected


# Visual reasoning


def test_a_sentence_about_two_images_is_true_or_false(judge):
    found = judge(images=IMAGES[:2], text="is there a seven?")
    assert {label["label"] for label in found} == {"True", "False"}
    assert found[0]["score"] >= found[1]["score"] and sum(numbers(found)) == pytest.approx(1)
    processor = make_processor()
    inputs = processor(images=IMAGES[:2], text="is there a seven?", return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].unsqueeze(0)
    with torch.no_grad():
        true = judge.model(**inputs).logits.softmax(dim=-1)[0, 1].item()
    assert {label["label"]: label["score"] for label in found}["True"] == pytest.approx(true, abs=1e-5)
    assert judge(images=IMAGES[:2], text="is there a seven?", top_k=1) == found[:1]
    swapped = judge(images=(IMAGES[1], np.array(IMAGES[0])), text="is there a seven?")
    assert numbers(swapped) != pytest.approx(numbers(found), rel=1e-4)


def test_pairs_and_sentences_in_batches(judge):
    pairs, sentences = [IMAGES[:2], IMAGES[1:]], ["the seven", "how many sevens are there, one or two?"]
    expected = [judge(images=pair, text=sentence) for sentence in sentences for pair in pairs]
    assert numbers(judge(images=pairs, text=sentences, batch_size=4)) == pytest.approx(numbers(expected), abs=1e-4)
    expected = [judge(images=pair, text=sentence) for pair, sentence in zip(pairs, sentences)]
    rows = [{"images": pair, "text": sentence} for pair, sentence in zip(pairs, sentences)]
    for given in (rows, {"images": pairs, "text": sentences}, iter(rows)):
        assert numbers(list(judge(given, batch_size=2))) == pytest.approx(numbers(expected), abs=1e-4)


def test_names_of_labels_that_a_configuration_has_are_kept():
    names = {0: "no", 1: "yes"}
    model = make_task_model("nlvr2", {"id2label": names, "label2id": {"no": 0, "yes": 1}})
    assert model.config.id2label == names
    assert make_task_model("nlvr2").config.id2label == {0: "False", 1: "True"}  # as the collator's labels


# Retrieval


def test_texts_are_scored_by_the_matching_head_and_by_features(match):
    texts = ["the seven", "is there a three of red?", "no"]
    found = match(image=IMAGES[0], text=texts)
    assert [one["text"] for one in found] == texts and set(found[0]) == {"text", "score", "similarity"}
    inputs = make_processor()(images=[IMAGES[0]], text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = match.model(**inputs).itm_score.softmax(dim=-1)[:, 1]
        similarity = match.model(**inputs, use_itm_head=False).itm_score[0]
    assert [one["score"] for one in found] == pytest.approx(scores.tolist(), abs=1e-5)
    assert [one["similarity"] for one in found] == pytest.approx(similarity.tolist(), abs=1e-5)
    one = match(image=IMAGES[0], text=texts[1])
    assert len(one) == 1 and numbers(one) == pytest.approx(numbers(found[1]), abs=1e-5)


def test_images_and_texts_in_batches(match, monkeypatch):
    texts = ["the seven", "is there a three of red?"]
    expected = [match(image=image, text=texts) for image in IMAGES]
    for batch_size in (1, 2, 3):
        found = match(image=IMAGES, text=texts, batch_size=batch_size)
        assert numbers(found) == pytest.approx(numbers(expected), abs=1e-4)
    rows = [{"image": image, "text": text} for image, text in zip(IMAGES, [texts, texts[0], texts[1:]])]
    found = list(match(iter(rows), batch_size=3))
    assert [len(one) for one in found] == [2, 1, 1]
    assert numbers(found) == pytest.approx(numbers([match(**row) for row in rows]), abs=1e-4)
    found = match({"image": IMAGES[:2], "text": texts})  # one text each
    assert numbers(found) == pytest.approx(numbers([expected[0][0], expected[1][1]]), abs=1e-4)
    monkeypatch.setattr("madtp_hf.modeling.pipeline_madtp_blip._PAIRS_AT_ONCE", 3)
    assert numbers(match(image=IMAGES, text=texts, batch_size=3)) == pytest.approx(numbers(expected), abs=1e-4)


@pytest.mark.parametrize(
    "task, arguments, error, message",
    [
        ("captioning", {}, ValueError, "image is missing"),
        ("captioning", {"image": IMAGES, "prompt": ["a"]}, ValueError, r"3 image\(s\) and 1 prompt\(s\)"),
        ("captioning", {"image": [IMAGES[0], 5]}, TypeError, r"image\[1\] is a int"),
        ("captioning", {"image": IMAGES[0], "prompt": 5}, TypeError, "prompt is a int"),
        ("captioning", {"image": IMAGES[0], "top_k": 5}, TypeError, "got top_k: expected .* generate_kwargs"),
        ("nlvr2", {"images": IMAGES[0], "text": "a"}, TypeError, r"images\[0\]|images is a"),
        ("nlvr2", {"images": IMAGES, "text": "a"}, TypeError, r"images\[0\] is a Image: expected a pair"),
        ("nlvr2", {"images": IMAGES[:2]}, ValueError, "text is missing"),
        ("nlvr2", {"images": IMAGES[:2], "text": "a", "top_k": 0}, ValueError, "top_k=0"),
        ("retrieval", {"image": IMAGES[0], "text": []}, ValueError, "text is an empty list"),
        (
            "retrieval",
            {"image": IMAGES[0], "text": ["a", 5]},
            TypeError,
            r"text\[1\] is a int|expected a string or a list",
        ),
        ("retrieval", {"image": IMAGES[0]}, ValueError, "text is missing"),
    ],
)  # fmt: skip
def test_bad_input_is_named(request, task, arguments, error, message):
    called = request.getfixturevalue({"captioning": "caption", "nlvr2": "judge", "retrieval": "match"}[task])
    with pytest.raises(error, match=message) as caught:
        called(**arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


# A setting for one call


@pytest.mark.parametrize("task", ["vqa", "captioning", "nlvr2", "retrieval"])
def test_a_reduction_of_one_call_is_seen_by_no_other_thread(task):
    model = make_task_model(task, {"pruning_schedule": [[0.2, 0.3], [0.4, 1.0], [0.6, 4.0], [0.7, 30.0]]})
    asks, reductions = model.as_pipeline(make_processor()), [None, 0, 0.3, 0.5, 0.7]
    inputs = {"images": IMAGES[:2], "text": PROMPTS[0]} if task == "nlvr2" else {"image": IMAGES[0]}
    inputs |= {"vqa": {"question": PROMPTS[0]}, "retrieval": {"text": PROMPTS}}.get(task, {})
    before = copy.deepcopy(model.config.to_dict())

    def answer(reduction):
        return asks(inputs, reduction=reduction)

    alone = [answer(reduction) for reduction in reductions]
    assert alone[0] == alone[1]  # dense, as the model is
    assert task == "captioning" or alone[1] != alone[4]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(answer, reductions * 8))
    assert together == alone * 8
    assert model.config.to_dict() == before
    with pytest.raises(ValueError, match=r"0\.9.* outside"):
        asks(inputs, reduction=0.9)


# Images that are encoded once, texts that are too long


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_image_is_encoded_once_for_all_its_questions(batch_size, tmp_path, monkeypatch):
    ask = as_pipeline("vqa")
    questions = [f"how many {word} are there" for word in ("sevens", "three", "two", "one", "red")]
    IMAGES[0].save(tmp_path / "image.png")
    expected = [[ask(image, question)[0]["answer"] for image in IMAGES] for question in questions]
    encoded = []
    ask.model.vision_model.register_forward_hook(lambda module, args, output: encoded.append(len(args[0])))
    alone = ask(IMAGES[0], questions, batch_size=batch_size)
    assert sum(encoded) == 1
    assert [answer[0]["answer"] for answer in alone] == [of_question[0] for of_question in expected]
    encoded.clear()
    # Every question about every image: the first question about each image, then the second.
    every = ask(IMAGES, questions, batch_size=batch_size)
    assert sum(encoded) == len(IMAGES)
    assert [answer[0]["answer"] for answer in every] == [answer for of_question in expected for answer in of_question]
    encoded.clear()
    read = []
    monkeypatch.setattr(
        "madtp_hf.modeling.pipeline_madtp_blip.read_image", lambda path: read.append(path) or IMAGES[0]
    )
    ask(
        [{"image": str(tmp_path / "image.png"), "question": question} for question in questions], batch_size=batch_size
    )
    assert sum(encoded) == len(read) == 1
    # The next call, which may prune otherwise, encodes it anew.
    with_more = ask(IMAGES[0], questions[0])
    ask.model.set_pruning(None)
    assert ask(IMAGES[0], questions[0])[0]["score"] != with_more[0]["score"]


def test_an_image_is_encoded_once_for_all_its_prompts(caption):
    encoded = []
    handle = caption.model.vision_model.register_forward_hook(lambda module, args, output: encoded.append(1))
    pairs = [{"image": IMAGES[0], "prompt": prompt} for prompt in PROMPTS]
    together = caption(pairs)
    handle.remove()
    assert len(encoded) == 1 and together == [caption(IMAGES[0], prompt) for prompt in PROMPTS]


TOO_LONG = " ".join(["seven"] * 90)


@pytest.mark.parametrize("task", ["vqa", "captioning", "nlvr2", "retrieval"])
def test_texts_that_are_too_long_are_an_error_or_truncated_on_request(task, caplog):
    warning_once.cache_clear()
    pipe, image = as_pipeline(task), IMAGES[:2] if task == "nlvr2" else IMAGES[0]
    longest = pipe.model.config.text_config.max_position_embeddings
    with pytest.raises(ValueError, match=f"A text is 92 tokens long: this model reads at most {longest}.*truncation="):
        pipe(image, TOO_LONG)
    assert not caplog.text
    for _ in range(2):
        assert pipe(image, TOO_LONG, truncation=True)
    assert caplog.text.count(f"more than {longest} tokens") == 1
