"""Load what the commands need: the model of a checkpoint's task, its processor, and batches of data."""

from types import SimpleNamespace

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BlipProcessor, CLIPProcessor, PretrainedConfig

from .tasks import TASKS, get_task, task_of


_PROCESSORS = {"BLIP": BlipProcessor, "CLIP": CLIPProcessor}
IN_MEMORY = 256  # samples whose tensors are kept; of more, each pass reads the images again


def load_model(source, task: str | None = None, device: str | None = None, **overrides):
    """Load the model of a checkpoint's task and its processor, from a checkpoint of transformers or of this
    package.

    Args:
        source (`str` or `Path`):
            A folder or a Hub id: a BLIP or CLIP of transformers, or a checkpoint of this package.
        task (`str`, *optional*):
            One of `madtp_hf.tasks.TASKS`; by default that of the class in the configuration's `architectures`.
        device (`str`, *optional*):
            By default `"cuda"` where there is one, else `"cpu"`.
        overrides:
            Fields of the configuration for a model made from transformers', such as `num_alignment_tokens`.

    Returns:
        The model, in float32 and set to evaluation; the processor; and whether the checkpoint was transformers', so
        that the alignment tokens are new.

    Raises:
        ValueError: for what is no checkpoint, or one of another task.
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
        found, class_name = TASKS[task], ""  # nothing names a class: what is asked for is tried
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
    """Make the collator of a model's task; it truncates texts to the model's number of positions."""
    task, text_config = TASKS[model.task], model.config.text_config
    start = [text_config.bos_token_id] if task.decoder_inputs else []
    return task.collator(processor, *start, max_length=text_config.max_position_embeddings)


def make_batches(model, processor, rows: list[dict], batch_size: int):
    """Make batches that can be read repeatedly: a list for few samples, a `DataLoader` for many."""
    if TASKS[model.task].text_column is None:  # captions, which a pass doesn't need
        rows = [{"captions": [""], **row} for row in rows]
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=make_collator(model, processor))
    if len(rows) > IN_MEMORY:
        return loader
    return list(tqdm(loader, desc="reading images", unit=" batches", leave=False))
