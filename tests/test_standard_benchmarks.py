"""Adapters for mteb, CLIP_benchmark and lmms-eval: features and captions are the model's own."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from madtp_hf.standard_benchmarks.clip_benchmark import load_for_clip_benchmark
from madtp_hf.standard_benchmarks.lmms_eval import LmmsEvalModel, remove_instructions
from madtp_hf.standard_benchmarks.mteb import MtebEncoder

from .conftest import close, make_processor, make_task_model
from .helpers.clip import make_clip_model, make_clip_processor
from .helpers.likelihood import log_likelihood


SCHEDULE = {"pruning_schedule": [[0.3, 1.0], [0.6, 4.0]]}
TEXTS = {
    "clip": ["red seven", "a blue one", "two of the green threes", "ten"],
    "retrieval": ["is there a seven", "three", "how many sevens are there?", "the leftmost digit"],
}
QUESTION = "is there a seven?"
INSTRUCTION = "\nAnswer the question using a single word or phrase."


def images(number=4) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    shape = (60, 40, 3)
    return [Image.fromarray(generator.integers(0, 64 * (i + 1), shape, np.uint8)) for i in range(number)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of small random models with a schedule, by task."""
    folder = tmp_path_factory.mktemp("models")
    for task in ("clip", "retrieval", "vqa", "captioning"):
        model = make_clip_model(SCHEDULE) if task == "clip" else make_task_model(task, SCHEDULE)
        model.save_pretrained(folder / task)
        (make_clip_processor() if task == "clip" else make_processor()).save_pretrained(folder / task)
    return {path.name: str(path) for path in folder.iterdir()}


@torch.no_grad()
def features(loaded, task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the images and the texts, by the model and its processor alone."""
    model, processor = loaded
    tokens = processor.tokenizer(TEXTS[task], padding=True, return_tensors="pt")
    pixels = processor.image_processor(images(), return_tensors="pt").pixel_values
    texts = model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
    return model.get_image_features(pixels).pooler_output, texts


BUDGETS = pytest.mark.parametrize("reduction", [0.0, 0.5])
EMBEDDERS = pytest.mark.parametrize("task", ["clip", "retrieval"])


@BUDGETS
@EMBEDDERS
def test_mteb_s_encode_gives_the_model_s_features(checkpoints, task, reduction):
    encoder = MtebEncoder(checkpoints[task], reduction=reduction, device="cpu")
    assert encoder.model.is_pruning == bool(reduction)
    of_images, of_texts = features((encoder.model, encoder.processor), task)
    rows = {"image": images(), "text": TEXTS[task]}
    close(encoder.encode([{"image": rows["image"]}]), of_images, atol=1e-4)
    close(encoder.encode([{"text": rows["text"][:3]}, {"text": rows["text"][3:]}]), of_texts, atol=1e-4)
    close(encoder.encode([rows]), of_images + of_texts, atol=1e-4)  # as mteb's wrappers of CLIP and BLIP
    with pytest.raises(ValueError, match="The batch has audio: expected text, image or both"):
        encoder.encode([{"audio": []}])


@BUDGETS
@EMBEDDERS
@torch.no_grad()
def test_clip_benchmark_s_model_gives_the_model_s_features(checkpoints, task, reduction):
    model, transform, tokenizer = load_for_clip_benchmark(checkpoints[task], str(reduction), device="cpu")
    of_images, of_texts = features((model.model, _processor(task)), task)
    close(model.encode_image(torch.stack([transform(image) for image in images()])), of_images)
    close(model.encode_text(tokenizer(TEXTS[task])), of_texts)
    assert tokenizer("seven").shape[0] == 1


def _processor(task: str):
    return make_clip_processor() if task == "clip" else make_processor()


def test_clip_benchmark_s_mistakes_are_named(checkpoints):
    for arguments, message in (
        ({"pretrained": "laion400m_e32"}, "expected a reduction, such as 0 or 0.5, or 'saved'"),
        ({"pretrained": "0.9"}, "outside what this model's schedule covers, 0.3 to 0.6"),
        ({"cache_dir": "cache"}, "HF_HUB_CACHE"),
    ):
        with pytest.raises(ValueError, match=message):
            load_for_clip_benchmark(checkpoints["clip"], **arguments)
    with pytest.raises(ValueError, match="the task is 'retrieval' or 'clip'"):
        load_for_clip_benchmark(checkpoints["vqa"])


@pytest.mark.parametrize(
    "prompt",
    [
        QUESTION + INSTRUCTION,
        f"<image>{QUESTION}\nAnswer the question with a single word.",
        f"{QUESTION} Answer:",
        f"{QUESTION}\nPlease answer the question using a single word or phrase.",
        f"{QUESTION}\nWhen the provided information is insufficient, respond with 'Unanswerable'.{INSTRUCTION}",
        QUESTION,
    ],
)
def test_instructions_of_chat_models_are_removed(prompt):
    assert remove_instructions(prompt) == QUESTION


def test_a_question_keeps_its_words():
    question = "what is the answer: with a word or in a picture?"
    assert remove_instructions(question) == question


def _requests(*arguments):
    """Requests as lmms-eval makes them, for documents 0, 1, 2, ..."""
    read = lambda document: [document["image"]]  # noqa: E731
    return [SimpleNamespace(args=(*given, read, i, "task", "test")) for i, given in enumerate(arguments)]


def _lmms(checkpoint: str, **options) -> LmmsEvalModel:
    lm = LmmsEvalModel(checkpoint, device="cpu", batch_size=3, **options)
    lm.task_dict = {"task": {"test": [{"image": image} for image in images()]}}
    return lm


@torch.no_grad()
def test_lmms_eval_s_captions_continue_the_prompt(checkpoints):
    lm = _lmms(checkpoints["captioning"], reduction=0.5, prompt="the color of", num_beams=2)
    task = ("Provide a one-sentence caption for the provided image.", {"max_new_tokens": 6})
    captions = lm.generate_until(_requests(*[task] * 4))
    prompt = lm.processor.tokenizer("the color of", return_tensors="pt").input_ids
    for image, caption in zip(images(), captions, strict=True):
        pixels = lm.processor.image_processor(image, return_tensors="pt").pixel_values
        ids = lm.model.generate(pixels, prompt, max_new_tokens=6, num_beams=2)
        expected = lm.processor.tokenizer.decode(ids[0, prompt.shape[1] - 1 :], skip_special_tokens=True)
        assert caption == expected.strip()
    likely = lm.loglikelihood(_requests(*[(task[0], " seven")] * 4))
    assert len({round(score, 4) for score, _ in likely}) == 4  # each of its own image
    lm.task_dict["task"]["test"][0]["image"] = None
    with pytest.raises(TypeError, match="The image is a NoneType: expected a path"):
        lm.generate_until(_requests(task))


@pytest.mark.parametrize("reduction, batch_size", [(0.0, 1), (0.5, 1), (0.5, 3)])
@pytest.mark.parametrize("task", ["vqa", "captioning"])
def test_lmms_eval_s_likelihoods_are_those_of_the_logits(checkpoints, task, reduction, batch_size):
    prompt = "the color of" if task == "captioning" else ""
    lm = _lmms(checkpoints[task], reduction=reduction, prompt=prompt)
    lm.batch_size = batch_size
    texts = [QUESTION, "is there a three?", "how many sevens are there?", QUESTION] if task == "vqa" else [""] * 4
    answers = ["yes", "seven", "one three", "two red sevens"]
    found = lm.loglikelihood(_requests(*((text + INSTRUCTION, f" {answer}") for text, answer in zip(texts, answers))))
    for (score, is_greedy), image, text, answer in zip(found, images(), texts, answers, strict=True):
        pixels = lm.processor.image_processor(image, return_tensors="pt").pixel_values
        assert score == pytest.approx(-log_likelihood(lm.model, lm.processor, pixels, text, answer, prompt), abs=1e-3)
        assert is_greedy is False  # random weights
