"""`handler.py`: what a Hugging Face Inference Endpoint runs for a checkpoint with MADTP token pruning.

It needs transformers, torch and Pillow, and the other files of the checkpoint, whose code it runs. A request:

    {
        "inputs": {"image": "<base64 or URL>", "question": "how many sevens are there?"},
        "parameters": {"reduction": 0.5}
    }

`inputs` is what the task's pipeline takes, or a list of such inputs: `image` and `question` (question answering),
`image` and optionally `prompt`, or only an image (captioning), `images`, a list of two, and `text` (visual reasoning),
`image` and `text`, a string or a list (retrieval), `image` and `candidate_labels` (CLIP). `parameters` are the
pipeline's, and `reduction`: the share of FLOPs to save in this request, 0 for none. Without it, the model prunes as
the checkpoint was saved.
"""

import base64
import binascii
import io
import json
import threading
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import Image
from transformers import pipeline
from transformers.image_utils import load_image


ZERO_SHOT = "zero-shot-image-classification"
TIMEOUT = 20  # seconds, to fetch an image
_EXPECTED = "expected base64 of an image file, or an http(s) URL of one"


def read_image(value) -> Image.Image:
    """Decode an image of a request.

    value: base64, with or without `data:image/...;base64,`, an http(s) URL, the bytes of an image file, or a PIL
    image.

    Raises:
        ValueError: for anything else. File paths are not read, because requests come from outside.
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        try:
            return load_image(value, timeout=TIMEOUT)
        except Exception as error:  # raised by network libraries or by Pillow
            raise ValueError(
                f"The image at {value[:200]} can't be read ({type(error).__name__}): {_EXPECTED}."
            ) from error
    if isinstance(value, str):
        try:
            value = base64.b64decode(value.partition(";base64,")[2] or value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"The image {value[:40]!r} is no base64: {_EXPECTED}.") from error
    if not isinstance(value, (bytes, bytearray)):
        raise ValueError(f"The image is a {type(value).__name__}: {_EXPECTED}.")
    try:
        return load_image(Image.open(io.BytesIO(value)))  # upright, and in RGB
    except (OSError, ValueError) as error:
        raise ValueError(f"The {len(value)} bytes of an image can't be read: {_EXPECTED}.") from error


def read_inputs(inputs):
    """Return a request's inputs with all of their images decoded."""
    if isinstance(inputs, list):
        return [read_inputs(item) for item in inputs]
    if not isinstance(inputs, dict):
        return read_image(inputs)

    def read_all(value):
        return [read_all(item) for item in value] if isinstance(value, list) else read_image(value)

    return {key: read_all(value) if key in ("image", "images") else value for key, value in inputs.items()}


class EndpointHandler:
    """The handler that an endpoint calls: it runs the pipeline of a checkpoint.

    Args:
        path (`str`):
            The checkpoint's folder, which holds this file. A Hub id is refused, because its code could have changed.
    """

    def __init__(self, path: str = ""):
        folder = Path(path or ".").resolve()
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"There is no {folder / 'config.json'}: expected the folder of a checkpoint.")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.task = next(iter(config.get("custom_pipelines") or {}), ZERO_SHOT)
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        self.pipeline = pipeline(self.task, model=str(folder), trust_remote_code=True, device=device)
        self.lock = threading.Lock()  # pruning is set on the model, which all requests share

    def __call__(self, data: dict) -> list:
        """Answer a request, `{"inputs": ..., "parameters": {...}}`, with the pipeline's output.

        Raises:
            ValueError, TypeError: for an invalid request, with a one-line message.
        """
        if not isinstance(data, dict):
            raise ValueError(f"The request is a {type(data).__name__}: expected an object with inputs.")
        parameters = dict(data.get("parameters") or {})
        inputs = data.get("inputs")
        if inputs is None:
            inputs = {key: value for key, value in data.items() if key not in ("inputs", "parameters")}
        if not isinstance(inputs, Image.Image) and not inputs:
            raise ValueError("The request has no inputs: expected what the pipeline of the task takes.")
        inputs, reduction = read_inputs(inputs), parameters.pop("reduction", None)
        model = self.pipeline.model
        with self.lock, nullcontext() if reduction is None else model.pruning(reduction=reduction):
            if self.task == ZERO_SHOT:
                return self._classify(inputs, parameters)
            return self.pipeline(inputs, **parameters)

    def _classify(self, inputs, parameters: dict) -> list:
        """Score how well each candidate label fits an image (CLIP)."""
        if isinstance(inputs, list):
            return [self._classify(item, parameters) for item in inputs]
        options = dict(parameters)
        if isinstance(inputs, dict):
            options |= {key: value for key, value in inputs.items() if key != "image"}
            inputs = inputs.get("image")
        if inputs is None or not options.get("candidate_labels"):
            raise ValueError("image or candidate_labels is missing: expected an image and a list of labels.")
        return self.pipeline(inputs, **options)
