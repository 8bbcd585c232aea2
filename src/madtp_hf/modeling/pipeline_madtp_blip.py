"""The pipelines of BLIP's tasks. transformers 5 has none of them, so checkpoints ship them.

Each takes an image, or a pair of images, and a text about it. All have the same call: with one of each, with lists, or
with dicts of both.
"""

import base64
import os
import types
from contextlib import nullcontext

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import Pipeline
from transformers.image_utils import httpx  # the client that transformers itself fetches images with

from .images import Image, UnreadableImage, read_image
from .texts import tokenize


_IMAGE = "a PIL image, a uint8 array (height, width, 3), or a path, URL or base64 string of an image"
_STRING = "a string"
_PAIRS_AT_ONCE = 64  # pairs of an image and a text per pass of the matching head


def _is_image(value) -> bool:
    return isinstance(value, (str, os.PathLike, np.ndarray, Image.Image))


def _is_two_images(value) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_image, value))


def _is_string(value) -> bool:
    return isinstance(value, str)


def _is_strings(value) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_is_string, value))


def _load_image(image, timeout: float | None = None) -> Image.Image:
    """Read an image as `read_image` does, also from a URL or base64 string, as transformers' `load_image` takes them.

    `load_image` itself decodes differently: it clips 16-bit levels and reveals transparent pixels.
    """
    if not isinstance(image, str) or os.path.isfile(image):
        return read_image(image)
    name = f"The image {repr(image) if len(image) <= 200 else repr(image[:200]) + '...'}"
    is_url, reason = image.startswith(("http://", "https://")), "no such file, and no base64 of an image"
    try:
        if is_url:
            content = httpx.get(image, timeout=timeout, follow_redirects=True).raise_for_status().content
        else:
            text = image.partition(",")[2] if image.startswith("data:image/") else image
            content = base64.b64decode("".join(text.split()), validate=True)
        return read_image(content)
    except httpx.HTTPError as error:
        raise UnreadableImage(" ".join(str(error).split()) or type(error).__name__, name) from error
    except ValueError as error:
        raise UnreadableImage(error.reason if is_url else reason, name) from error


class MadtpBlipPipeline(Pipeline):
    """Base class of the pipelines, which handles calls and reports invalid inputs.

    An image is a PIL image, an array (height, width, 3) of uint8, or a path, URL or base64 string. All pipelines take,
    in a call or in `pipeline(...)` for all calls, `reduction` (the share of FLOPs to save in this call, 0 for none;
    other threads' calls don't see it), and `padding`, `truncation` (of texts that are too long, which are an error
    otherwise) and `timeout` (seconds to fetch an image) as in other pipelines. A call raises a `TypeError` for an
    image or a text of another type, and a `ValueError` for one that is missing, for an empty list, for lists of
    unequal lengths in a dict, for an input that holds no image, and for a text that is too long.

    parts: for each of the two parts of an input, the image first: a function that tells whether a value is a single
    one, and a description of what is expected, for error messages.
    """

    parts: dict = {}
    # Further arguments of `preprocess`, `_forward` and `postprocess`.
    parameters: tuple[tuple[str, ...], ...] = (("padding", "truncation", "timeout"), ("reduction",), ())
    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model.eval()
        if self.device.type == "cpu" and self.model.inference_precision is None:
            self.model.prepare_for_inference()

    def _sanitize_parameters(self, **given):
        unknown = given.keys() - {name for names in self.parameters for name in names}
        if unknown:
            *most, last = (name for names in self.parameters for name in names)
            raise TypeError(f"The pipeline got {', '.join(unknown)}: expected {', '.join(most)} or {last}.")
        top_k = given.get("top_k")
        if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
            raise ValueError(f"top_k={top_k!r}: expected a whole number of at least 1.")
        found = tuple({n: given[n] for n in names if given.get(n) is not None} for names in self.parameters)
        found[0]["last"] = {}  # the last image that this call has read
        if "generate_kwargs" in self.parameters[1]:
            found[1]["last"] = {}  # and encoded
        return found

    # Call arguments

    @property
    def _shape(self) -> str:
        return "{" + ", ".join(f'"{name}": ...' for name in self.parts) + "}"

    def _ask(self, image, text, **kwargs):
        """Call the pipeline with every text for every image, the first text first; without texts, with pairs."""
        image_name, text_name = self.parts
        if text is None:
            return super().__call__(self._pairs(image), **kwargs)
        if image is None:
            raise ValueError(
                f"{image_name} is missing: expected {image_name}=... and {text_name}=..., or a dict of both."
            )
        images, texts = self._as_list(image_name, image), self._as_list(text_name, text)
        if self._is_one(image_name, image) and self._is_one(text_name, text):
            return super().__call__({image_name: image, text_name: text}, **kwargs)
        # An image's texts come one after the other, so that it is read and encoded once.
        results = super().__call__([{image_name: i, text_name: t} for i in images for t in texts], **kwargs)
        return [result for start in range(len(texts)) for result in results[start :: len(texts)]]

    def _is_one(self, name: str, value) -> bool:
        return self.parts[name][0](value)

    def _as_list(self, name: str, value) -> list:
        """Return one value of a part, or several, as a list."""
        is_one, expected = self.parts[name]
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

    def _check_pair(self, pair, where: str) -> dict:
        """Return the two parts of a dict with one of each; raise an error that names `where` for other values.

        Other keys, such as a data set's, are left out.
        """
        if not isinstance(pair, dict):
            raise TypeError(f"In the input, {where} is a {type(pair).__name__}: expected a dict, {self._shape}.")
        for name, (is_one, expected) in self.parts.items():
            if name not in pair:
                keys = f"the keys {list(pair)} and no {name}"
                raise ValueError(f"In the input, {where} has {keys}: expected {self._shape}.")
            if not is_one(pair[name]):
                raise TypeError(f"The {name} of {where} is a {type(pair[name]).__name__}: expected {expected}.")
        return {name: pair[name] for name in self.parts}

    def _read_dict(self, inputs: dict):
        """Return a dict as one pair or, if both of its values are lists, as a list of pairs."""
        image, text = self.parts
        images, texts = inputs.get(image), inputs.get(text)
        is_one_pair = self._is_one(image, images) and self._is_one(text, texts)
        if is_one_pair or not (self._is_several(image, images) and self._is_several(text, texts)):
            return self._check_pair(inputs, "the dict")
        if len(images) != len(texts) or not images:
            raise ValueError(
                f"The dict has {len(images)} {image}(s) and {len(texts)} {text}(s): expected one of each, or lists of"
                f" one length, paired in order; for every {text} with every {image}, pass {image}=[...] and"
                f" {text}=[...]."
            )
        for name in self.parts:
            self._as_list(name, inputs[name])  # checks each
        return [{image: one, text: other} for one, other in zip(images, texts)]

    def _is_several(self, name: str, value) -> bool:
        """Whether a value is, or can be read as, a list of several values.

        A list can also be a single value, such as the texts for one image.
        """
        if not isinstance(value, (list, tuple)):
            return False
        return not self._is_one(name, value) or all(self._is_one(name, item) for item in value)

    def _pairs(self, inputs):
        """Check and return inputs given in place of the two parts, without reading images."""
        image, text = self.parts
        if inputs is None or self._is_one(image, inputs):
            raise ValueError(f"{text} is missing: expected {image}=... and {text}=..., or a dict of both.")
        if isinstance(inputs, dict):
            return self._read_dict(inputs)
        if isinstance(inputs, (list, tuple)):
            if not inputs:
                raise ValueError(f"The list is empty: expected at least one {self._shape}.")
            return [self._check_pair(pair, f"item {index} of the list") for index, pair in enumerate(inputs)]
        if isinstance(inputs, (Dataset, types.GeneratorType)):
            return inputs
        if not (hasattr(inputs, "__iter__") or hasattr(inputs, "__getitem__")):
            expected = f"{image}=... and {text}=..., or {self._shape} or a list of such"
            raise TypeError(f"The pipeline got a {type(inputs).__name__}: expected {expected}.")
        return (pair for pair in inputs)  # such as `datasets.Dataset`, which is not a torch dataset

    # Model inputs

    def _read_images(self, images: list, timeout: float | None, last: dict | None) -> torch.Tensor:
        """Read images into pixel_values (len(images), 3, H, W); the same paths or URLs as last are not read again."""
        last = {} if last is None else last
        are_named = all(isinstance(image, (str, os.PathLike)) for image in images)
        if are_named and last.get("names") == images:
            return last["pixels"]
        read = [_load_image(image, timeout) for image in images]
        pixels = self.image_processor(images=read, return_tensors="pt").pixel_values.to(self.model.dtype)
        last.update(names=images if are_named else None, pixels=pixels)
        return pixels

    def _encode_images(self, pixel_values: torch.Tensor, last: dict | None) -> dict[str, torch.Tensor]:
        """Encode images for `generate`; one that equals its predecessor, also in the batch before, is not encoded."""
        last = {} if last is None else last
        predecessors = torch.cat([last.get("pixels", pixel_values[:1]), pixel_values[:-1]])
        is_new = (pixel_values != predecessors).flatten(1).any(dim=1)
        is_new[0] |= not last
        states = [last["states"]] if last else []
        if is_new.any():
            output = self.model.vision_model(pixel_values[is_new])
            embeds, mask = output.last_hidden_state, output.attention_mask
            states += embeds if mask is None else [row[real] for row, real in zip(embeds, mask)]
        index = (is_new.cumsum(0) - (0 if last else 1)).tolist()
        chosen = [states[i] for i in index]
        last.update(pixels=pixel_values[-1:], states=chosen[-1])
        lengths = torch.tensor([len(row) for row in chosen], device=pixel_values.device)
        padded = pad_sequence(chosen, batch_first=True)
        mask = torch.arange(padded.shape[1], device=lengths.device) < lengths[:, None]
        return {"image_embeds": padded, "image_mask": mask}

    def _read_texts(self, texts, padding, truncation, return_tensors="pt"):
        """Return input_ids and attention_mask of a text, or of a list of texts."""
        longest, options = self.model.config.text_config.max_position_embeddings, {"return_tensors": return_tensors}
        read = tokenize(self.tokenizer, texts, longest, truncation, padding=padding, **options)
        return {"input_ids": read.input_ids, "attention_mask": read.attention_mask}

    def forward(self, model_inputs, reduction: float | None = None, **forward_params):
        with nullcontext() if reduction is None else self.model.pruning(reduction=reduction):
            return super().forward(model_inputs, **forward_params)

    def _generation_options(self, prompt_length: int, options: dict) -> dict:
        """Limit `max_new_tokens` to the decoder's length, less the prompt's."""
        room = self.model.config.text_config.max_position_embeddings - prompt_length
        return {**options, "max_new_tokens": min(options["max_new_tokens"], room)}

    def preprocess(self, inputs, padding=False, truncation=False, timeout=None, last=None):
        image, text = self._check_pair(inputs, "the pair").values()
        read = self._read_texts(text, padding, truncation)
        return {**read, "pixel_values": self._read_images([image], timeout, last)}


class MadtpBlipVisualQuestionAnsweringPipeline(MadtpBlipPipeline):
    """Pipeline that answers questions about images.

    ```python
    >>> from transformers import pipeline

    >>> ask = pipeline("visual-question-answering", model=checkpoint, trust_remote_code=True)
    >>> ask(image="scene.png", question="how many sevens are there?")
    [{"answer": "two", "score": 0.93}]
    ```

    A call also takes `top_k` (the number of answers to each question, the likeliest first; defaults to 1),
    `max_new_tokens` (defaults to 10, limited to the decoder's length) and `generate_kwargs` (further arguments of the
    model's `generate`). The score of an answer is the product of its tokens' probabilities.
    """

    parts = {"image": (_is_image, _IMAGE), "question": (_is_string, _STRING)}
    parameters = (
        ("padding", "truncation", "timeout"),
        ("reduction", "top_k", "max_new_tokens", "generate_kwargs"),
        (),
    )

    def __call__(self, image=None, question=None, **kwargs):
        r"""
        Args:
            image (an image, `dict` or a list of them):
                One image or several. Without `question`, pairs: a dict `{"image": ..., "question": ...}`, or a list,
                generator or dataset of them.
            question (`str` or `list[str]`, *optional*):
                One question or several. With two lists, every question is asked about every image, as in transformers
                4: the first question about each image, then the second. To ask a separate question about each image,
                pass a list of pairs.

        Returns:
            A list of `{"answer": str, "score": float}`, the likeliest first. For several questions or images, a list
            of such lists.
        """
        return self._ask(image, question, **kwargs)

    def _forward(self, model_inputs, top_k=1, max_new_tokens=10, generate_kwargs=None, last=None):
        images = self._encode_images(model_inputs.pop("pixel_values"), last)
        defaults = {"num_beams": top_k, "do_sample": False, "max_new_tokens": max_new_tokens}
        fixed = {"num_return_sequences": top_k, "return_dict_in_generate": True, "output_scores": True}
        options = self._generation_options(1, {**defaults, **(generate_kwargs or {}), **fixed})
        output = self.model.generate(**model_inputs, **images, **options)
        beams = getattr(output, "beam_indices", None)
        log_probabilities = self.model.text_decoder.compute_transition_scores(
            output.sequences, output.scores, beams, normalize_logits=beams is None
        )
        # Padding after the end of an answer doesn't count in its score.
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


class MadtpBlipImageToTextPipeline(MadtpBlipPipeline):
    """Pipeline that generates captions of images, optionally from a prompt.

    ```python
    >>> from transformers import pipeline

    >>> caption = pipeline("image-to-text", model=checkpoint, trust_remote_code=True)
    >>> caption("scene.png")
    [{"generated_text": "a seven and two ones"}]
    ```

    The call equals that of the pipeline of this name in transformers 4. transformers 5's `"image-text-to-text"` works
    with these checkpoints too, but requires a text for each image. A call also takes `max_new_tokens` (defaults to 20,
    limited to the decoder's length) and `generate_kwargs` (further arguments of the model's `generate`).
    """

    parts = {"image": (_is_image, _IMAGE), "prompt": (_is_string, _STRING)}
    parameters = (("padding", "truncation", "timeout"), ("reduction", "max_new_tokens", "generate_kwargs"), ())

    def __call__(self, image=None, prompt=None, **kwargs):
        r"""
        Args:
            image (an image, `dict` or a list of them):
                One image or several. Or pairs: a dict `{"image": ..., "prompt": ...}`, or a list, generator or dataset
                of them.
            prompt (`str` or `list[str]`, *optional*):
                The beginning of every caption, or a list with the beginning of each image's caption.

        Returns:
            A list of `{"generated_text": str}`, prompt included, one for each sequence that `generate_kwargs` asks
            for. For several images, a list of such lists.
        """
        if image is None:
            raise ValueError("image is missing: expected an image or a list of images.")
        if isinstance(image, dict) and "image" in image:
            no_prompt = [""] * len(image["image"]) if self._is_several("image", image["image"]) else ""
            image = {"prompt": no_prompt, **image}
        begins_with_image = isinstance(image, (list, tuple)) and len(image) > 0 and _is_image(image[0])
        if prompt is None and not _is_image(image) and not begins_with_image:
            return self._ask(image, None, **kwargs)
        if prompt is None or _is_string(prompt):
            return self._ask(image, prompt or "", **kwargs)
        images, prompts = self._as_list("image", image), self._as_list("prompt", prompt)
        if len(images) != len(prompts):
            raise ValueError(
                f"{len(images)} image(s) and {len(prompts)} prompt(s): expected one prompt for all, or one for each"
                " image."
            )
        return self._ask([{"image": i, "prompt": p} for i, p in zip(images, prompts)], None, **kwargs)

    def _check_pair(self, pair, where: str) -> dict:
        """Check a pair as the other pipelines do; an image alone or a dict without a prompt gets an empty prompt."""
        pair = {"image": pair} if _is_image(pair) else pair
        return super()._check_pair({"prompt": "", **pair} if isinstance(pair, dict) else pair, where)

    def _forward(self, model_inputs, max_new_tokens=20, generate_kwargs=None, last=None):
        images, number = self._encode_images(model_inputs.pop("pixel_values"), last), len(model_inputs["input_ids"])
        options = {"max_new_tokens": max_new_tokens, **(generate_kwargs or {}), "return_dict_in_generate": False}
        options = self._generation_options(model_inputs["input_ids"].shape[1] - 1, options)  # the model drops [SEP]
        return {"sequences": self.model.generate(**model_inputs, **images, **options).unflatten(0, (number, -1))}

    def postprocess(self, model_outputs):
        texts = self.tokenizer.batch_decode(model_outputs["sequences"][0], skip_special_tokens=True)
        return [{"generated_text": text.strip()} for text in texts]


class MadtpBlipImagesAndTextClassificationPipeline(MadtpBlipPipeline):
    """Pipeline that classifies whether sentences about pairs of images are true (NLVR2).

    ```python
    >>> from transformers import pipeline

    >>> judge = pipeline("images-and-text-classification", model=checkpoint, trust_remote_code=True)
    >>> judge(images=["left.png", "right.png"], text="both images show a seven")
    [{"label": "True", "score": 0.97}, {"label": "False", "score": 0.03}]
    ```

    Label names come from the configuration's `id2label`. A call also takes `top_k` (the number of labels for each
    sentence, the likeliest first; defaults to all).
    """

    parts = {"images": (_is_two_images, "a pair [left, right] of images"), "text": (_is_string, _STRING)}
    parameters = (("padding", "truncation", "timeout"), ("reduction",), ("top_k",))

    def __call__(self, images=None, text=None, **kwargs):
        r"""
        Args:
            images (a pair of images, `dict` or a list of them):
                One pair `[left, right]` or several. Without `text`, a dict `{"images": [left, right], "text": ...}`,
                or a list, generator or dataset of them.
            text (`str` or `list[str]`, *optional*):
                One sentence or several. With two lists, every sentence is classified for every pair: the first
                sentence for each pair, then the second. For a separate sentence with each pair, pass a list of dicts.

        Returns:
            A list of `{"label": str, "score": float}`, the likeliest first. For several sentences or pairs, a list of
            such lists.
        """
        return self._ask(images, text, **kwargs)

    def preprocess(self, inputs, padding=False, truncation=False, timeout=None, last=None):
        images, text = self._check_pair(inputs, "the pair").values()
        read = self._read_texts(text, padding, truncation)
        return {**read, "pixel_values": self._read_images(list(images), timeout, last).unsqueeze(0)}

    def _forward(self, model_inputs):
        return {"scores": self.model(**model_inputs).logits.float().softmax(dim=-1)}

    def postprocess(self, model_outputs, top_k=None):
        labels = self.model.config.id2label
        scores = enumerate(model_outputs["scores"][0].tolist())
        found = [{"label": labels[index], "score": score} for index, score in scores]
        return sorted(found, key=lambda label: -label["score"])[:top_k]


class MadtpBlipImageTextRetrievalPipeline(MadtpBlipPipeline):
    """Pipeline that scores how well images and texts match.

    ```python
    >>> from transformers import pipeline

    >>> match = pipeline("image-text-retrieval", model=checkpoint, trust_remote_code=True)
    >>> match(image="scene.png", text=["a red seven", "two blue ones"])
    [{"text": "a red seven", "score": 0.98, "similarity": 0.61}, {"text": "two blue ones", "score": 0.02, "similarity":
    0.13}]
    ```

    `score` is the probability of a match by the matching head, with cross-attention of the text to image states.
    `similarity` is the cosine similarity of the two features, which are computed separately, as for a search index.
    There is no `padding`.
    """

    parts = {
        "image": (_is_image, _IMAGE),
        "text": (lambda value: _is_string(value) or _is_strings(value), "a string or a list of strings"),
    }
    parameters = (("truncation", "timeout"), ("reduction",), ())

    def __call__(self, image=None, text=None, **kwargs):
        r"""
        Args:
            image (an image, `dict` or a list of them):
                One image or several. Without `text`, a dict `{"image": ..., "text": ...}`, or a list, generator or
                dataset of them.
            text (`str` or `list[str]`, *optional*):
                One text or several, all of which are compared with each image. Each image is encoded only once.

        Returns:
            A list of `{"text": str, "score": float, "similarity": float}`, one for each text, in the order of the
            texts. For several images, a list of such lists.
        """
        if text is not None and not self._is_one("text", text):
            text = self._as_list("text", text)  # such as an array of strings
        return self._ask(image, text, **kwargs)

    def preprocess(self, inputs, truncation=False, timeout=None, last=None):
        image, text = self._check_pair(inputs, "the pair").values()
        texts = [text] if _is_string(text) else list(text)
        input_ids = self._read_texts(texts, False, truncation, return_tensors=None)["input_ids"]
        return {"pixel_values": self._read_images([image], timeout, last), "texts": texts, "input_ids": input_ids}

    def _forward(self, model_inputs):
        # A batch holds a list of texts for each image; a single sample holds just its texts.
        pixel_values, texts, ids = (model_inputs[name] for name in ("pixel_values", "texts", "input_ids"))
        if _is_string(texts[0]):
            texts, ids = [texts], [ids]
        images, device = self.model._encode_images(pixel_values), pixel_values.device
        counts = [len(of_image) for of_image in texts]
        image_of = torch.arange(len(texts)).repeat_interleave(torch.tensor(counts)).to(device)
        flat = self.tokenizer.pad({"input_ids": [row for of_image in ids for row in of_image]}, return_tensors="pt")
        flat = [flat[name].to(device) for name in ("input_ids", "attention_mask")]
        states, mask, features = images.hidden_states, images.mask, self.model._image_feature(images)
        scores, similarities = [], []
        for chosen, *text in zip(*(tensor.split(_PAIRS_AT_ONCE) for tensor in (image_of, *flat))):
            logits = self.model.match(*text, states[chosen], None if mask is None else mask[chosen])
            scores.append(logits.float().softmax(dim=-1)[:, 1])
            of_texts = self.model.get_text_features(*text).pooler_output
            similarities.append((features[chosen] * of_texts).sum(dim=-1).float())
        scores, similarities = torch.cat(scores).split(counts), torch.cat(similarities).split(counts)
        return {"scores": list(scores), "similarities": list(similarities), "texts": texts}

    def postprocess(self, model_outputs):
        texts = model_outputs["texts"]
        scores, similarities = (model_outputs[name][0].tolist() for name in ("scores", "similarities"))
        rows = zip(texts if _is_string(texts[0]) else texts[0], scores, similarities)
        return [{"text": text, "score": score, "similarity": similarity} for text, score, similarity in rows]


# Keyed by the task name that `pipeline` takes: transformers 4's where it has the task, else our own.
PIPELINES = {
    "visual-question-answering": MadtpBlipVisualQuestionAnsweringPipeline,
    "image-to-text": MadtpBlipImageToTextPipeline,
    "images-and-text-classification": MadtpBlipImagesAndTextClassificationPipeline,
    "image-text-retrieval": MadtpBlipImageTextRetrievalPipeline,
}

__all__ = [pipeline.__name__ for pipeline in PIPELINES.values()]
