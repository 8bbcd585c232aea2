"""The visual question answering pipeline, which transformers 5 no longer has; a checkpoint brings this one along."""

import os
import types

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from transformers import Pipeline
from transformers.image_utils import load_image


_IMAGE = "a PIL image, a uint8 array (height, width, 3), or a path, URL or base64 string of an image"
_QUESTION = "a string"


def _is_image(value) -> bool:
    return isinstance(value, (str, os.PathLike, np.ndarray, Image.Image))


def _is_question(value) -> bool:
    return isinstance(value, str)


# Of each of a pair's parts: whether a value is a single one, and what is expected.
_PARTS = {"image": (_is_image, _IMAGE), "question": (_is_question, _QUESTION)}


def read_image(image, timeout: float | None = None) -> Image.Image:
    """Open an image in RGB and turn it upright by its EXIF orientation; used by the pipeline and by the collators.

    Args:
        image (`str`, `os.PathLike`, `numpy.ndarray` or `PIL.Image.Image`):
            A path, URL or base64 string; an array (height, width, 3) of uint8; or a PIL image.
        timeout (`float`, *optional*):
            Seconds to wait for a URL.

    Raises:
        TypeError: for a value of another type.
        ValueError: for an array of another shape or dtype, and for a string or file that holds no image.
        FileNotFoundError: if there is no file at a `pathlib.Path`.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(
                f"The image is an array of shape {image.shape} and dtype {image.dtype}: expected (height, width, 3)"
                " and uint8."
            )
        return Image.fromarray(image)
    if not _is_image(image):
        raise TypeError(f"The image is a {type(image).__name__}: expected {_IMAGE}.")
    if isinstance(image, os.PathLike):
        if not os.path.isfile(image):
            raise FileNotFoundError(f"There is no file {os.fspath(image)}: expected the path of an image.")
        image = os.fspath(image)
    try:
        return load_image(image, timeout=timeout)
    except (OSError, ValueError) as error:
        shown = repr(image) if len(repr(image)) <= 200 else f"{repr(image)[:200]}..."
        # transformers' own message repeats the string, which can be a whole base64 image.
        reason = "no such file, and no base64 of an image" if isinstance(error, ValueError) else error
        raise ValueError(f"The image {shown} can't be read ({reason}): expected {_IMAGE}.") from error


def _as_list(name: str, value) -> list:
    """One image or question, or several, as a list; `name` is `"image"` or `"question"`."""
    is_one, expected = _PARTS[name]
    if is_one(value):
        return [value]
    if isinstance(value, (str, bytes, dict)) or not (hasattr(value, "__iter__") or hasattr(value, "__getitem__")):
        raise TypeError(f"{name} is a {type(value).__name__}: expected {expected}, or a list of them.")
    values = list(value)
    if not values:
        raise ValueError(f"{name} is an empty list: expected {expected}, or a list of at least one.")
    for index, item in enumerate(values):
        if not is_one(item):
            raise TypeError(f"{name}[{index}] is a {type(item).__name__}: expected {expected}.")
    return values


def _check_keys(pair, where: str) -> None:
    """Raise an error if `pair` is no dict with an image and a question; other keys are allowed, as of a data set."""
    if not isinstance(pair, dict):
        raise TypeError(f'{where} is a {type(pair).__name__}: expected a dict, {{"image": ..., "question": ...}}.')
    for name in _PARTS:
        if name not in pair:
            raise ValueError(
                f'{where} has the keys {list(pair)} and no {name}: expected {{"image": ..., "question": ...}}.'
            )


def _check_pair(pair, where: str) -> dict:
    """The image and the question of a dictionary with one of each; an error that begins with `where` for any other."""
    _check_keys(pair, where)
    for name, (is_one, expected) in _PARTS.items():
        if not is_one(pair[name]):
            raise TypeError(f"The {name} of {where} is a {type(pair[name]).__name__}: expected {expected}.")
    return {name: pair[name] for name in _PARTS}


def _read_dict(inputs: dict):
    """A dictionary as one pair, or, where both of its values are lists, as a list of pairs."""
    _check_keys(inputs, "The dict")
    several = [name for name, (is_one, _) in _PARTS.items() if isinstance(inputs[name], (list, tuple))]
    if not several:
        return _check_pair(inputs, "the dict")
    lengths = {name: len(inputs[name]) if name in several else "one" for name in _PARTS}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"The dict has {lengths['image']} image(s) and {lengths['question']} question(s): expected one of each or"
            " lists of one length, paired in order; to ask every question about every image, pass image=[...] and"
            " question=[...]."
        )
    lists = [_as_list(name, inputs[name]) for name in _PARTS]
    return [dict(zip(_PARTS, pair)) for pair in zip(*lists)]


class MadtpBlipVisualQuestionAnsweringPipeline(Pipeline):
    """Answers questions about images.

    ```python
    >>> from transformers import pipeline

    >>> ask = pipeline("visual-question-answering", model=checkpoint, trust_remote_code=True)
    >>> ask(image="scene.png", question="how many sevens are there?")
    [{"answer": "two", "score": 0.93}]
    ```

    Parameters of a call, or of `pipeline(...)` for all calls: `top_k` (answers a question, the likeliest first; 1 if
    not given), `max_new_tokens` and what else the model's `generate` takes, as `generate_kwargs`; `padding`,
    `truncation` and `timeout` (seconds, to fetch an image) as elsewhere. A score is the probability of the answer,
    token by token.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # On a CPU the fast way is the ordinary way; it takes as much memory again as the large weights.
        if self.device.type == "cpu":
            self.model.eval().prepack_for_inference()

    def _sanitize_parameters(
        self,
        top_k=None,
        padding=None,
        truncation=None,
        timeout=None,
        max_new_tokens=None,
        generate_kwargs=None,
        **unknown,
    ):
        if unknown:
            raise TypeError(
                f"The pipeline got {', '.join(unknown)}: expected top_k, padding, truncation, timeout,"
                " max_new_tokens or generate_kwargs."
            )
        preprocess, forward = {}, {}
        for name, value in (("padding", padding), ("truncation", truncation), ("timeout", timeout)):
            if value is not None:
                preprocess[name] = value
        if top_k is not None:
            if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
                raise ValueError(f"top_k={top_k!r}: expected a whole number of at least 1.")
            forward["top_k"] = top_k
        if max_new_tokens is not None:
            forward["max_new_tokens"] = max_new_tokens
        if generate_kwargs is not None:
            forward["generate_kwargs"] = generate_kwargs
        return preprocess, forward, {}

    def __call__(self, image=None, question=None, **kwargs):
        r"""
        Args:
            image (`str`, `os.PathLike`, `numpy.ndarray`, `PIL.Image.Image`, `dict` or a list of them):
                An image: a PIL image, an array (height, width, 3) of uint8, or a path, URL or base64 string. Or
                several. Without a question, pairs: `{"image": ..., "question": ...}`, or a list, generator or dataset
                of such.
            question (`str` or `list[str]`, *optional*):
                One question or several. Two lists mean every question about every image, as in transformers 4: the
                first question about each image, then the second. To ask each image a question of its own, pass a list
                of pairs.

        Returns:
            A list of `{"answer": str, "score": float}`, the likeliest first; for several questions or images a list
            of such lists.

        Raises:
            TypeError: for an image, a question or a pair of another type.
            ValueError: if image or question is missing or an empty list, for a dict with lists of unequal lengths,
            and for what holds no
                image.
        """
        if question is None:
            return super().__call__(self._pairs(image), **kwargs)
        if image is None:
            raise ValueError("image is missing: expected image=... and question=..., or a dict of both.")
        images, questions = _as_list("image", image), _as_list("question", question)
        if _is_image(image) and _is_question(question):
            return super().__call__({"image": image, "question": question}, **kwargs)
        return super().__call__([{"image": i, "question": q} for q in questions for i in images], **kwargs)

    @staticmethod
    def _pairs(inputs):
        """Check what was given instead of an image and a question, as far as that reads no image, and return it."""
        if inputs is None or _is_image(inputs):
            raise ValueError("question is missing: expected image=... and question=..., or a dict of both.")
        if isinstance(inputs, dict):
            return _read_dict(inputs)
        if isinstance(inputs, (list, tuple)):
            if not inputs:
                raise ValueError('The list is empty: expected at least one {"image": ..., "question": ...}.')
            return [_check_pair(pair, f"item {index} of the list") for index, pair in enumerate(inputs)]
        if isinstance(inputs, Dataset) or isinstance(inputs, types.GeneratorType):
            return inputs
        if not (hasattr(inputs, "__iter__") or hasattr(inputs, "__getitem__")):
            raise TypeError(
                f'The pipeline got a {type(inputs).__name__}: expected image=... and question=..., or {{"image": ...,'
                ' "question": ...} or a list of such.'
            )
        return (pair for pair in inputs)  # such as `datasets.Dataset`, which is no torch dataset

    def preprocess(self, inputs, padding=False, truncation=True, timeout=None):
        inputs = _check_pair(inputs, "the pair")
        image = read_image(inputs["image"], timeout=timeout)
        text = self.tokenizer(
            inputs["question"],
            return_tensors="pt",
            padding=padding,
            truncation=truncation,
            max_length=self.model.config.text_config.max_position_embeddings if truncation else None,
        )
        pixel_values = self.image_processor(images=image, return_tensors="pt").pixel_values
        return {
            "input_ids": text.input_ids,
            "attention_mask": text.attention_mask,
            "pixel_values": pixel_values.to(self.model.dtype),
        }

    def _forward(self, model_inputs, top_k=1, max_new_tokens=10, generate_kwargs=None):
        defaults = {"num_beams": top_k, "do_sample": False, "max_new_tokens": max_new_tokens}
        fixed = {"num_return_sequences": top_k, "return_dict_in_generate": True, "output_scores": True}
        output = self.model.generate(**model_inputs, **{**defaults, **(generate_kwargs or {}), **fixed})
        beams = getattr(output, "beam_indices", None)
        log_probabilities = self.model.text_decoder.compute_transition_scores(
            output.sequences, output.scores, beams, normalize_logits=beams is None
        )
        # What follows the end of an answer is padding, and no part of it.
        padding = output.sequences[:, 1:] == self.model.config.text_config.pad_token_id
        scores = log_probabilities.masked_fill(padding, 0.0).sum(dim=1).exp()
        return {"sequences": output.sequences.unflatten(0, (-1, top_k)), "scores": scores.unflatten(0, (-1, top_k))}

    def postprocess(self, model_outputs):
        answers = self.tokenizer.batch_decode(model_outputs["sequences"][0], skip_special_tokens=True)
        scores = model_outputs["scores"][0].float().tolist()
        return sorted(
            ({"answer": answer.strip(), "score": score} for answer, score in zip(answers, scores)),
            key=lambda answer: -answer["score"],
        )


__all__ = ["MadtpBlipVisualQuestionAnsweringPipeline"]
