"""lmms-eval evaluates BLIP for question answering and for captioning:

    lmms-eval --model madtp_hf --model_args pretrained=outputs/vqa,reduction=0.5 --tasks vqav2_val --batch_size 32

lmms-eval finds the model by an entry point of this package.
"""

import dataclasses
import itertools
import json
import re

import numpy as np
import torch
from torch.nn import functional as F

from ..jobs.reading import Batch, prepare
from ..jobs.run import progress
from ..jobs.workers import Answerer, Generation, Writer
from ..modeling.images import read_image
from . import load_to_evaluate


try:
    from lmms_eval.api.model import lmms
except ImportError:  # lmms-eval's registry requires its base class; without lmms-eval, nothing else here needs it
    lmms = object

# What tasks append to a question for chat models. BLIP's questions come without, and it would read it as a part.
INSTRUCTIONS = (
    r"When the provided information is insufficient, respond with 'Unanswerable'\.",
    r"(Please )?answer (the question )?(using|with|in) (an? |one )?(single |short )?(word|phrase|answer|integer).*",
    r"Answer:",
)
_INSTRUCTIONS = re.compile(rf"(\s*({'|'.join(INSTRUCTIONS)}))+\s*$", re.IGNORECASE)


def remove_instructions(prompt: str) -> str:
    """Return a question without `<image>` and without "Answer the question using a single word or phrase."."""
    return _INSTRUCTIONS.sub("", prompt.replace("<image>", "")).strip()


class LmmsEvalModel(lmms):
    """A model as lmms-eval's `lmms`; captions continue a prompt of BLIP's, whatever the task's prompt says.

    Args:
        pretrained (`str`): The checkpoint's folder or Hub id, for question answering or captioning.
        reduction (`float`, *optional*), precision (`str`), revision (`str`, *optional*), device (`str`, *optional*):
            See `load_to_evaluate`, also for the errors.
        prompt (`str`, *optional*, defaults to `"a picture of"`): What captions continue.
        num_beams (`int`, *optional*): Beams, instead of those that the task asks for.
        batch_size (`int` or `str`, *optional*, defaults to 1): Requests per forward pass.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        reduction: float | None = None,
        precision: str = "float32",
        revision: str | None = None,
        prompt: str = "a picture of",
        num_beams: int | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
    ):
        super().__init__()
        tasks = Answerer.tasks + Writer.tasks
        loaded = load_to_evaluate(pretrained, tasks, reduction, device=device, precision=precision, revision=revision)
        self.model, self.processor, self.task = loaded.model, loaded.processor, loaded.task
        self.prompt, self.num_beams, self.batch_size = prompt, num_beams, int(batch_size)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def generate_until(self, requests) -> list[str]:
        """Answer questions, or caption images.

        Raises:
            ValueError: for a request that doesn't have one image.
        """
        texts = []
        for chunk in self._chunks(requests, lambda arguments: json.dumps(arguments[1], sort_keys=True, default=str)):
            generation = dict(chunk[0][1])
            ends = generation.get("until") or []
            worker = self._writer(generation)
            images = [self._image(*arguments[2:]) for arguments in chunk]
            pixels = np.stack([prepare(image, self.processor.image_processor) for image in images])
            questions: list[str | None] = [remove_instructions(arguments[0]) for arguments in chunk]
            for text in worker(Batch([*range(len(chunk))], pixels, questions)):
                for end in [ends] if isinstance(ends, str) else ends:
                    text = text.partition(end)[0] if end else text
                texts.append(text.strip())
        return texts

    def _writer(self, given: dict) -> Writer:
        temperature = given.get("temperature") or 0.0
        samples = temperature > 0 and bool(given.get("do_sample", True))
        generation = Generation(
            prompt=self.prompt if self.task.text_column is None else None,
            max_new_tokens=given.get("max_new_tokens", 30),
            num_beams=self.num_beams or given.get("num_beams") or 1,
            do_sample=samples,
            temperature=temperature if samples else None,
            top_p=given.get("top_p") if samples else None,
        )
        kind = Writer if self.task.text_column is None else Answerer
        return kind(self.model, self.processor, None, generation)

    @torch.no_grad()
    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """Score continuations: for each, minus its log-likelihood with the end of text, and whether greedy decoding
        gives it.

        The sign is that of lmms-eval's other models: it chooses the answer with the lowest value.
        """
        collator = self.task.make_collator(self.model, self.processor)
        if self.task.text_column is None:
            collator = dataclasses.replace(collator, prompt=self.prompt)
        scores: list[tuple[float, bool]] = []
        for chunk in self._chunks(requests, lambda arguments: ""):
            rows = []
            for context, target, *rest in chunk:
                text = target if isinstance(target, str) else str(target(self._document(*rest[1:])))
                question = {"question": remove_instructions(context), "answer": text.strip()}
                rows.append({"image": self._image(*rest), "captions": [text.strip()], **question})
            batch = {name: tensor.to(self.device) for name, tensor in collator(rows).items()}
            batch["pixel_values"] = batch["pixel_values"].to(self.model.dtype)
            logits, labels = self.model(**batch).logits[:, :-1].float(), batch["labels"][:, 1:]
            losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(dim=1)
            is_greedy = ((logits.argmax(dim=-1) == labels) | (labels == -100)).all(dim=1)
            scores += zip(losses.tolist(), is_greedy.tolist())
        return scores

    def generate_until_multi_round(self, requests) -> list[str]:
        raise NotImplementedError("BLIP answers one question at a time: expected a task without several rounds.")

    def _chunks(self, requests, key):
        """Yield lists of up to `batch_size` requests' arguments, in order, with the same `key`."""
        with progress(len(requests), "request", None) as bar:
            for _, group in itertools.groupby((request.args for request in requests), key):
                while chunk := list(itertools.islice(group, self.batch_size)):
                    yield chunk
                    bar.update(len(chunk))

    def _document(self, index, task: str, split: str):
        return self.task_dict[task][split][index]

    def _image(self, read_images, index, task: str, split: str):
        images = read_images(self._document(index, task, split)) or []
        if len(images) != 1:
            raise ValueError(
                f"Document {index} of {task} has {len(images)} images: expected one, because BLIP reads one."
            )
        return read_image(images[0])


def manifest():
    """Return what lmms-eval's registry of models holds; the entry point in the group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("madtp_hf", simple_class_path=f"{__name__}.LmmsEvalModel")
