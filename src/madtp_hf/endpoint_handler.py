"""What a Hugging Face Inference Endpoint runs of a checkpoint with MADTP token pruning: `handler.py`.

It needs transformers, torch and Pillow, and the other files of the checkpoint, whose code it runs. A request:

    {"inputs": {"image": "<base64 or URL>", "question": "how many sevens are there?"}, "parameters": {"reduction":
    0.5}}

`inputs` is what the task's pipeline takes, or a list of such: `image` and `question` (question answering), `image`
and, if wanted, `prompt`, or an image alone (captioning), `images`, a list of two, and `text` (visual reasoning),
`image` and `text`, a string or a list (retrieval), `image` and `candidate_labels` (CLIP). `parameters` are the
pipeline's, and `reduction`: the share of FLOPs to save in this request, 0 for none; if not given, as the checkpoint
was saved.
"""

import base64
import binascii
import io
import json
import threading
from pathlib import Path

import torch
from PIL import Image
from transformers import pipeline
from transformers.image_utils import load_image


ZERO_SHOT = "zero-shot-image-classification"
TIMEOUT = 20  # seconds, to fetch an image
_EXPECTED = "expected base64 of an image file, or an http(s) URL of one"


def read_image(value) -> Image.Image:
    """An image of a request: base64, with or without `data:image/...;base64,`, a URL, bytes of a file, or PIL's.

    Raises:
        ValueError: for anything else; paths of files are not read, as requests come from elsewhere.
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        try:
            return load_image(value, timeout=TIMEOUT)
        except Exception as error:  # of the network's libraries and of Pillow
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
    """What a request holds, with its images read, wherever they are."""
    if isinstance(inputs, list):
        return [read_inputs(item) for item in inputs]
    if not isinstance(inputs, dict):
        return read_image(inputs)

    def read_all(value):
        return [read_all(item) for item in value] if isinstance(value, list) else read_image(value)

    return {key: read_all(value) if key in ("image", "images") else value for key, value in inputs.items()}


class EndpointHandler:
    """The pipeline of a checkpoint, as an endpoint calls it.

    Args:
        path (`str`):
            The checkpoint's folder, in which this file lies. A name on the Hub is refused, whose code could be any by
            then.
    """

    def __init__(self, path: str = ""):
        folder = Path(path or ".").resolve()
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"There is no {folder / 'config.json'}: expected the folder of a checkpoint.")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.task = next(iter(config.get("custom_pipelines") or {}), ZERO_SHOT)
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        self.pipeline = pipeline(self.task, model=str(folder), trust_remote_code=True, device=device)
        self.lock = threading.Lock()  # a model prunes as it was told last

    def __call__(self, data: dict) -> list:
        """Answer a request, `{"inputs": ..., "parameters": {...}}`; the answer is the pipeline's.

        Raises:
            ValueError, TypeError: for a request that can't be, in one line.
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
        with self.lock:
            model = self.pipeline.model
            before = (model.config.pruning_temperature, model.config.pruning_threshold_factor)
            try:
                if reduction is not None:
                    model.set_pruning(reduction=reduction)
                if self.task == ZERO_SHOT:
                    return self._classify(inputs, parameters)
                return self.pipeline(inputs, **parameters)
            finally:
                model.config.pruning_temperature, model.config.pruning_threshold_factor = before

    def _classify(self, inputs, parameters: dict) -> list:
        """CLIP: how well each of some labels fits an image."""
        if isinstance(inputs, list):
            return [self._classify(item, parameters) for item in inputs]
        options = dict(parameters)
        if isinstance(inputs, dict):
            options |= {key: value for key, value in inputs.items() if key != "image"}
            inputs = inputs.get("image")
        if inputs is None or not options.get("candidate_labels"):
            raise ValueError("image or candidate_labels is missing: expected an image and a list of labels.")
        return self.pipeline(inputs, **options)
