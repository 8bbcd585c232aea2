"""Load what the commands work with: a checkpoint's model and processor, and batches of data."""

from types import SimpleNamespace

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BlipProcessor, CLIPProcessor, PretrainedConfig

from ..tasks import TASKS, get_task, task_of


_PROCESSORS = {"BLIP": BlipProcessor, "CLIP": CLIPProcessor}
IN_MEMORY = 256  # up to this many samples, tensors are kept; beyond, each pass reads the images again


def load_model(source, task: str | None = None, device: str | None = None, **overrides):
    """Load the model for a checkpoint's task, and its processor, from transformers' or this package's checkpoints.

    Args:
        source (`str` or `Path`):
            A folder or a Hub id: a BLIP or CLIP of transformers, or a checkpoint of this package.
        task (`str`, *optional*):
            One of `madtp_hf.tasks.TASKS`; by default that of the class in the configuration's `architectures`.
        device (`str`, *optional*):
            By default `"cuda"` if available, else `"cpu"`.
        overrides:
            Configuration fields for a model made from a transformers checkpoint, such as `num_alignment_tokens`.

    Returns:
        The model, in float32 and in evaluation mode; the processor; and whether the checkpoint was transformers', in
        which case the alignment tokens are new.

    Raises:
        ValueError: if there is no checkpoint, or it is for another task.
    """
    if task is not None:
        get_task(task)
    reason = "it has no config.json"
    try:
        content, _ = PretrainedConfig.get_config_dict(source)
    except OSError as error:
        content, reason = {}, str(error).strip().partition("\n")[0].rstrip(".")
    if not content:
        raise ValueError(
            f"{source} can't be loaded ({reason}): expected a folder with a config.json, or a model on the Hub,"
            " of BLIP or CLIP."
        )
    if task is not None and not (content.get("architectures") or content.get("auto_map")):
        found, class_name = TASKS[task], ""  # no class is named, so try the task that was asked for
    else:
        found, class_name = task_of(SimpleNamespace(**content))
    if task not in (None, found.name):
        raise ValueError(
            f"{source} has a {class_name}, for {found.name!r}, and the task is {task!r}: nothing is trained here, so"
            f" expected a checkpoint for that task; leave the task out, or fine-tune one with examples/run_{task}.py."
        )
    model_class = TASKS[found.name].model_class
    is_dense = not class_name.startswith("Madtp")
    if is_dense:
        from_dense = model_class.from_clip if found.family == "CLIP" else model_class.from_blip
        model = from_dense(str(source), **overrides)
    else:
        model = model_class.from_pretrained(str(source))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.float().to(device).eval(), _PROCESSORS[found.family].from_pretrained(str(source)), is_dense


def make_collator(model, processor):
    """Return the collator of a model's task, which truncates texts at the model's maximum length."""
    task, text_config = TASKS[model.task], model.config.text_config
    start = [text_config.bos_token_id] if task.decoder_inputs else []
    return task.collator(processor, *start, max_length=text_config.max_position_embeddings)


def make_batches(model, processor, rows: list[dict], batch_size: int):
    """Make batches that can be read many times: a list for a few samples, a `DataLoader` for many."""
    if TASKS[model.task].text_column is None:  # captioning: the collator needs captions, a forward pass doesn't
        rows = [{"captions": [""], **row} for row in rows]
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=make_collator(model, processor))
    if len(rows) > IN_MEMORY:
        return loader
    return list(tqdm(loader, desc="reading images", unit=" batches", leave=False))
