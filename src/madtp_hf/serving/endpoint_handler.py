"""`handler.py`: what a Hugging Face Inference Endpoint runs for a checkpoint with MADTP token pruning.

It needs transformers, torch and Pillow, and the other files of the checkpoint, whose code it runs. A request:

    {
        "inputs": {"image": "<base64>", "question": "how many sevens are there?"},
        "parameters": {"reduction": 0.5}
    }

`inputs`, by task, is one of these, or a list of them:

    question answering      image, question
    captioning              image, prompt (optional); or only an image
    visual reasoning        images (a list of two), text
    retrieval               image, text (a string or a list)
    CLIP                    image, candidate_labels, hypothesis_template (optional)

An image is base64, with or without `data:image/...;base64,`, or, if the operator sets MADTP_FETCH_URLS=1, an http(s)
URL of a public server. `parameters` are those of the task, and nothing else:

    all tasks               reduction (the share of FLOPs to save in this request, 0 for none; without it, the model
                            prunes as the checkpoint was saved), on_error ("raise", or "skip": a bad input of a list
                            gives {"error": ...} in its place, and the others are answered)
    question answering      top_k, max_new_tokens, generate_kwargs
    captioning              max_new_tokens, generate_kwargs
    visual reasoning        top_k
    CLIP                    candidate_labels, hypothesis_template

[`Limits`] lists the limits on a request and the environment variables that set them.
"""

import base64
import binascii
import contextlib
import dataclasses
import ipaddress
import json
import os
import reprlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import torch
from PIL import Image
from transformers import pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module


ZERO_SHOT = "zero-shot-image-classification"
TEMPLATE = "This is a photo of {}."  # that pipeline's default
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow reads EPS, too, by starting Ghostscript
_EXPECTED = "expected base64 of an image file"
_REDIRECTS = 5
_UNICAST = ipaddress.ip_network("2000::/3")  # of IPv6
_TUNNELS = tuple(map(ipaddress.ip_network, ("2002::/16", "2001::/32")))  # 6to4 and Teredo carry any IPv4 address


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on a request. The environment variable MADTP_ and the name in capitals sets one: MADTP_MAX_PIXELS.

    Attributes:
        max_pixels (`int`): Of an image, checked before it is decoded.
        max_image_bytes (`int`): Of an image file, sent or fetched.
        max_body_bytes (`int`): Of a request, images in base64 included.
        max_depth (`int`): Lists and objects inside one another in a request.
        max_inputs (`int`): In a request's list.
        max_texts (`int`): Texts or labels for one image.
        max_text_length (`int`): Characters of a text, label or template.
        max_new_tokens (`int`): Of a text that is generated.
        max_beams (`int`): Beams of a generation, and texts that it returns.
        fetch_urls (`int`): 1 to accept http(s) URLs of images, 0 to refuse them.
        fetch_seconds (`float`): To fetch an image, redirects included.
    """

    max_pixels: int = 12_500_000
    max_image_bytes: int = 10_000_000
    max_body_bytes: int = 32_000_000
    max_depth: int = 8
    max_inputs: int = 32
    max_texts: int = 256
    max_text_length: int = 2_000
    max_new_tokens: int = 256
    max_beams: int = 8
    fetch_urls: int = 0
    fetch_seconds: float = 4.0

    @classmethod
    def from_environment(cls) -> "Limits":
        """Read the limits that environment variables set; the others have their defaults."""
        found: dict = {}
        for field in dataclasses.fields(cls):
            name = f"MADTP_{field.name.upper()}"
            if name in os.environ:
                try:
                    found[field.name] = (float if isinstance(field.default, float) else int)(os.environ[name])
                except ValueError:
                    found[field.name] = -1
                if not 0 <= found[field.name] < float("inf"):
                    raise ValueError(
                        f"The environment variable {name} is {os.environ[name]!r}: expected a number, such as"
                        f" {field.default}."
                    )
        return cls(**found)

    def check(self, name: str, given: int, what: str) -> None:
        """Raise a `ValueError` if `given` is more than the limit `name` allows."""
        limit = getattr(self, name)
        if given > limit:
            raise ValueError(
                f"{what}: expected at most {limit:,}; send less, or set MADTP_{name.upper()} on the server."
            )

    def check_text(self, name: str, value) -> str:
        """Return a text, or raise a `ValueError`."""
        _expect(isinstance(value, str), name, value, "a string")
        self.check("max_text_length", len(value), f"{name} has {len(value):,} characters")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{name} is {_shown(value)}, which has a lone surrogate: expected Unicode text.")
        return value

    def check_texts(self, name: str, value) -> list:
        """Return a list of at least one text, or raise a `ValueError`."""
        _expect(isinstance(value, (list, tuple)) and value, name, value, "a list of at least one string")
        self.check("max_texts", len(value), f"{name} has {len(value):,} items")
        return [self.check_text(f"{name}[{index}]", text) for index, text in enumerate(value)]

    def check_template(self, name: str, value) -> str:
        """Return a template with one `{}` and no other format specification, or raise a `ValueError`."""
        before, braces, after = self.check_text(name, value).partition("{}")
        is_template = braces and not set(before + after) & {"{", "}"}
        _expect(is_template, name, value, "a text with {} once and no other braces")
        return value

    def check_size(self, data) -> None:
        """Raise a `ValueError` for a request that is too large or has too many lists inside one another."""
        level, size = [data], 0
        for _ in range(self.max_depth + 1):
            below = []
            for value in level:
                if isinstance(value, (dict, list, tuple, str, bytes, bytearray)):
                    # An item of a list or an object takes up memory whatever it holds.
                    size += len(value) * (64 if isinstance(value, (dict, list, tuple)) else 1)
                    self.check("max_body_bytes", size, f"The request has at least {size:,} bytes")
                if isinstance(value, dict):
                    below += [*value.keys(), *value.values()]
                elif isinstance(value, (list, tuple)):
                    below += value
            if not below:
                return
            level = below
        what = f"The request has lists inside lists to a depth of more than {self.max_depth}"
        self.check("max_depth", self.max_depth + 1, what)


def _shown(value) -> str:
    """Return a short description of a value for a message of one line."""
    if isinstance(value, (str, float, bool)) or value is None:
        return reprlib.repr(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else "a number of more than 20 digits"
    return f"a {type(value).__name__}" + ("" if getattr(value, "__len__", None) is None or len(value) else ", empty")


def _expect(holds, name: str, value, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {_shown(value)}: expected {expected}.")


# Parameters


def _number(kind: type, least, most):
    def check(name: str, value):
        is_number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        expected = f"a {'whole ' if kind is int else ''}number from {least} to {most}"
        _expect(is_number and least <= value <= most, name, value, expected)
        return value

    return check


def _choice(*choices):
    def check(name: str, value):
        is_one = any(value is choice or (isinstance(value, str) and value == choice) for choice in choices)
        _expect(is_one, name, value, " or ".join(map(json.dumps, choices)))
        return value

    return check


def _options(checks: dict):
    """Return a check of an object whose values have checks by name; another name is refused."""

    def check(name: str, value) -> dict:
        _expect(isinstance(value, dict), name, value, "an object")
        for key in value:
            if not isinstance(key, str) or key not in checks:
                expected = ", ".join(checks) or "none"
                raise ValueError(
                    f"{name} has {_shown(key)}, which is not accepted: expected {expected}; leave it out."
                )
        return {key: checks[key](key, given) for key, given in value.items()}

    return check


def parameter_checks(task: str, limits: Limits) -> dict:
    """Return the parameters that a request for a task (a pipeline's name) may set: a check of the value by name."""
    beams, new_tokens = _number(int, 1, limits.max_beams), _number(int, 1, limits.max_new_tokens)
    generation = {
        "num_beams": beams,
        "max_new_tokens": new_tokens,
        "min_new_tokens": _number(int, 0, limits.max_new_tokens),
        "do_sample": _choice(True, False),
        "temperature": _number(float, 0.01, 100),
        "top_p": _number(float, 0.01, 1),
        "top_k": _number(int, 1, 1000),
        "typical_p": _number(float, 0.01, 1),
        "repetition_penalty": _number(float, 0.01, 100),
        "length_penalty": _number(float, -100, 100),
        "no_repeat_ngram_size": _number(int, 0, 100),
        "early_stopping": _choice(True, False),
    }
    checks = {
        "visual-question-answering": {
            "top_k": beams,
            "max_new_tokens": new_tokens,
            "generate_kwargs": _options(generation),
        },
        "image-to-text": {
            "max_new_tokens": new_tokens,
            "generate_kwargs": _options({**generation, "num_return_sequences": beams}),
        },
        "images-and-text-classification": {"top_k": _number(int, 1, 1000)},
        "image-text-retrieval": {},
        ZERO_SHOT: {"candidate_labels": limits.check_texts, "hypothesis_template": limits.check_template},
    }
    return {**checks[task], "reduction": _number(float, 0, 1), "on_error": _choice("raise", "skip")}


# Inputs


def input_checks(task: str, limits: Limits) -> dict:
    """Return the parts of an input of a task (a pipeline's name): a check of the value by name."""

    def image(name: str, value):
        if isinstance(value, Image.Image) and value.format in (None, "MPO", *FORMATS):
            return value
        _expect(isinstance(value, (str, bytes, bytearray)), name, value, "base64 of an image file")
        if isinstance(value, str) and value.startswith(("http://", "https://")) and not limits.fetch_urls:
            raise ValueError(
                f"{name} is the URL {_shown(value)}: {_EXPECTED}, because this server fetches no URLs; its operator"
                " can set MADTP_FETCH_URLS=1."
            )
        return value

    def two_images(name: str, value) -> list:
        _expect(isinstance(value, (list, tuple)) and len(value) == 2, name, value, "a list of two images")
        return [image(f"{name}[{index}]", one) for index, one in enumerate(value)]

    def texts(name: str, value):
        return (limits.check_text if isinstance(value, str) else limits.check_texts)(name, value)

    text, labels = limits.check_text, limits.check_texts
    return {
        "visual-question-answering": {"image": image, "question": text},
        "image-to-text": {"image": image, "prompt": text},
        "images-and-text-classification": {"images": two_images, "text": text},
        "image-text-retrieval": {"image": image, "text": texts},
        ZERO_SHOT: {"image": image, "candidate_labels": labels, "hypothesis_template": limits.check_template},
    }[task]


def read_content(value, limits: Limits):
    """Return the bytes of an image file from a request's base64 or URL; bytes and PIL images as they are.

    Raises:
        ValueError: for anything else, such as a path: requests come from outside, and no file is looked for.
    """
    if isinstance(value, str) and value.startswith(("http://", "https://")) and limits.fetch_urls:
        return fetch(value, limits)
    if isinstance(value, str):
        given = value
        limits.check("max_image_bytes", len(value) * 3 // 4, f"The image has {len(value) * 3 // 4:,} bytes")
        if value.startswith("data:image/"):
            value = value.partition(";base64,")[2]
        for blank in "\n\r\t ":  # `split` would take up much memory
            value = value.replace(blank, "")
        try:
            value = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"The image {_shown(given)} is not base64: {_EXPECTED}.") from error
    if isinstance(value, (bytes, bytearray)):
        limits.check("max_image_bytes", len(value), f"The image has {len(value):,} bytes")
    return value


# URLs


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, and not loopback, private, multicast, a tunnel, ..."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6 and (ip not in _UNICAST or any(ip in tunnel for tunnel in _TUNNELS)):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def fetch(url: str, limits: Limits) -> bytes:
    """Fetch an image from a public http(s) server.

    Redirects are followed and checked as the first URL is. The connection goes to the very address that was checked.

    Raises:
        ValueError: for an address that isn't public, a response without an image's bytes, one that is too large, or
            one that takes too long, however slowly its bytes come.
    """
    found: list[bytes | Exception] = []
    seconds = limits.fetch_seconds
    # The environment's proxies are not used: they would connect to another address than the one that was checked.
    with httpx.Client(trust_env=False, timeout=seconds) as client:

        def run():
            try:
                found.append(_follow(client, httpx.URL(url), time.monotonic() + seconds, limits))
            except Exception as error:
                found.append(error)

        # The system's resolver takes no time limit, nor do headers that come byte by byte. What is left of the thread
        # after the limit ends with the client's connections.
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(seconds)
        content = found[0] if found else TimeoutError()
    if isinstance(content, bytes):
        return content
    reason, expected = " ".join(str(content).split())[:200].rstrip(".") or type(content).__name__, _EXPECTED
    if isinstance(content, (TimeoutError, httpx.TimeoutException)):
        reason = f"it takes more than {seconds:g} seconds"
    else:
        expected += ", or an http(s) URL of one on a public server"
    raise ValueError(f"The image at {_shown(url)} can't be fetched ({reason}): {expected}.") from content


def _follow(client: httpx.Client, url: httpx.URL, deadline: float, limits: Limits) -> bytes:
    """Send GET requests, to public addresses alone, until one is not redirected; return the body of the response."""
    for _ in range(_REDIRECTS + 1):
        if url.scheme not in ("http", "https") or not url.host or url.userinfo or (url.port or 0) > 65535:
            raise ValueError(f"{_shown(str(url))} is not an http(s) URL of a server, without a user")
        response = _connect(client, url)
        with contextlib.closing(response):
            if response.has_redirect_location:
                url = url.join(response.headers["Location"])
                continue
            if response.status_code != 200:
                raise ValueError(f"the server answers {response.status_code}")
            content, length = bytearray(), int(response.headers.get("Content-Length", 0))
            limits.check("max_image_bytes", length, f"the image has {length:,} bytes")
            for chunk in response.iter_raw():
                content += chunk
                limits.check("max_image_bytes", len(content), f"the image has at least {len(content):,} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError
            return bytes(content)
    raise ValueError(f"it redirects more than {_REDIRECTS} times")


def _connect(client: httpx.Client, url: httpx.URL) -> httpx.Response:
    """Request a URL from an address of its host, whose name is resolved once and whose addresses are all public."""
    host, addresses = url.raw_host.decode("ascii"), []
    with contextlib.suppress(OSError, UnicodeError):
        port = url.port or (443 if url.scheme == "https" else 80)
        addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not addresses or not all(map(is_public, addresses)):
        raise ValueError(f"{_shown(host)} has no public address")
    headers = {"Host": url.netloc.decode("ascii"), "Accept": "image/*", "Accept-Encoding": "identity"}
    extensions = {"sni_hostname": host}  # the certificate is the name's
    for address in addresses:
        with contextlib.suppress(httpx.ConnectError):
            there = url.copy_with(host=address)
            return client.send(client.build_request("GET", there, headers=headers, extensions=extensions), stream=True)
    raise ValueError(f"{_shown(host)} doesn't accept the connection")


class EndpointHandler:
    """The handler that an endpoint calls: it checks requests and runs the pipeline of a checkpoint. Threads may share
    it.

    Args:
        path (`str`): The checkpoint's folder, which holds this file. A Hub id is refused, because its code could have
            changed.
        limits (`Limits`, *optional*): The limits on a request; by default those that environment variables set.
    """

    def __init__(self, path: str = "", limits: Limits | None = None):
        folder = Path(path or ".").resolve()
        for name in ("config.json", "images.py"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} does not exist: expected the folder of a checkpoint, with the files that"
                    " `madtp_hf.checkpoints.push.save_handler` adds."
                )
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.limits = limits or Limits.from_environment()
        self.task = next(iter(config.get("custom_pipelines") or {}), ZERO_SHOT)
        self.parts, self.check_parameters = (
            input_checks(self.task, self.limits),
            _options(parameter_checks(self.task, self.limits)),
        )
        self.read_image: Callable = get_class_from_dynamic_module("images.read_image", str(folder))
        self.unreadable: type[Exception] = get_class_from_dynamic_module("images.UnreadableImage", str(folder))
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        options: dict = {"task": self.task}  # not one of those that transformers' hints know
        self.pipeline = pipeline(**options, model=str(folder), trust_remote_code=True, device=device)
        # The first call prepares the weights and the tokenizer, which several threads mustn't do at once.
        image = Image.new("RGB", (32, 32))
        example = {**dict.fromkeys(self.parts, "a"), "image": image, "images": [image, image]}
        example |= {"candidate_labels": ["a"], "hypothesis_template": "{}"}
        self._run({name: example[name] for name in self.parts}, {}, None)

    def __call__(self, data: dict) -> list:
        """Answer a request, `{"inputs": ..., "parameters": {...}}`, with the pipeline's output.

        Raises:
            ValueError: for an invalid request, with a message of one line.
        """
        self.limits.check_size(data)
        _expect(isinstance(data, dict), "The request", data, "an object with inputs")
        inputs = data.get("inputs")
        others = {name: value for name, value in data.items() if name not in ("inputs", "parameters")}
        if inputs is not None and others:
            raise ValueError(f"The request has {_shown(next(iter(others)))}: expected only inputs and parameters.")
        inputs = others if inputs is None else inputs
        if isinstance(inputs, (dict, list, tuple, str, bytes)) and not inputs:
            raise ValueError(f"The request has no inputs: expected {self._expected()}, or a list of such.")
        parameters = self.check_parameters("parameters", data.get("parameters") or {})
        skip, reduction = parameters.pop("on_error", "raise") == "skip", parameters.pop("reduction", None)
        if not isinstance(inputs, (list, tuple)):
            return self._answer(inputs, parameters, reduction)
        self.limits.check("max_inputs", len(inputs), f"inputs has {len(inputs):,} items")
        if not skip:  # nothing is computed for a request that is refused
            self._each(lambda item: self._check_input(item, parameters), inputs, skip)
        return self._each(lambda item: self._answer(item, parameters, reduction), inputs, skip)

    def _each(self, function, inputs: list | tuple, skip: bool) -> list:
        """Call a function with each input; a `ValueError` names the input, or takes the place of its answer."""
        answers = []
        for index, item in enumerate(inputs):
            try:
                answers.append(function(item))
            except ValueError as error:
                message = f"inputs[{index}]: {error}"
                if not skip:
                    raise ValueError(message) from error
                answers.append({"error": message})
        return answers

    def _expected(self) -> str:
        return "{" + ", ".join(f'"{name}": ...' for name in self.parts) + "}"

    def _check_input(self, item, parameters: dict) -> dict:
        """Return an input's parts, checked, with images as they were sent."""
        if not isinstance(item, dict):
            item = {next(iter(self.parts)): item}
        item = {**{name: value for name, value in parameters.items() if name in self.parts}, **item}
        item = _options(self.parts)("The input", item)
        for name in self.parts:
            if name not in item and name not in ("prompt", "hypothesis_template"):
                raise ValueError(f"The input has no {name}: expected {self._expected()}.")
        if self.task == ZERO_SHOT:
            self._check_labels(**{"hypothesis_template": TEMPLATE, **item})
        return item

    def _check_labels(self, candidate_labels: list, hypothesis_template: str, **_) -> None:
        """Raise a `ValueError` for a label that is too long for CLIP; its pipeline doesn't truncate."""
        longest = self.pipeline.model.config.text_config.max_position_embeddings
        texts = [hypothesis_template.format(label) for label in candidate_labels]
        for index, mask in enumerate(self.pipeline.tokenizer(texts, padding=True)["attention_mask"]):
            if sum(mask) > longest:
                raise ValueError(
                    f"candidate_labels[{index}] has {sum(mask)} tokens in its template: expected at most {longest};"
                    " shorten it."
                )

    def _answer(self, item, parameters: dict, reduction: float | None) -> list:
        item = self._check_input(item, parameters)
        if "images" in item:
            item["images"] = [self._read_image(value) for value in item["images"]]
        else:
            item["image"] = self._read_image(item["image"])
        parameters = {name: value for name, value in parameters.items() if name not in self.parts}
        try:
            return self._run(item, parameters, reduction)
        except ValueError as error:  # such as options of `generate` that exclude each other
            raise ValueError(" ".join(str(error).split())[:500]) from error

    def _read_image(self, value) -> Image.Image:
        try:
            return self.read_image(read_content(value, self.limits), self.limits.max_pixels, formats=FORMATS)
        except self.unreadable as error:
            expected = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]} of at most {self.limits.max_pixels:,} pixels"
            raise ValueError(f"{str(error).rstrip('.')}: expected {expected}.") from error

    def _run(self, item: dict, parameters: dict, reduction: float | None) -> list:
        model = self.pipeline.model
        with contextlib.nullcontext() if reduction is None else model.pruning(reduction=reduction):
            if self.task == ZERO_SHOT:
                return self.pipeline(item.pop("image"), **item)
            return self.pipeline(item, **parameters)
