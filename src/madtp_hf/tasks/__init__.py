"""The registry of tasks. To add a task, write a file like `vqa.py`, with everything specific to it, and list it."""

from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from . import captioning, clip, nlvr2, retrieval, vqa
from .task import Task


IN_MEMORY = 256  # up to this many samples, tensors are kept; beyond, each pass reads the images again
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in (vqa, captioning, nlvr2, retrieval, clip)}


def get_task(name: str) -> Task:
    """Return the task of this name; raise a `ValueError` that lists all names if there is none."""
    if name not in TASKS:
        raise ValueError(f"task={name!r}: expected one of {', '.join(map(repr, TASKS))}.")
    return TASKS[name]


def task_of(config) -> tuple[Task, str]:
    """Return the task of a configuration and the name of its model class, ours or transformers' (without "Madtp").

    Args:
        config: A configuration, or an object with its attributes `architectures` and `auto_map`.

    Raises:
        ValueError: if the configuration names no task's model.
    """
    # In lower case, since transformers writes `CLIPModel`.
    tasks = {task.model_class.__name__.removeprefix("Madtp").lower(): task for task in TASKS.values()}
    # `architectures` is only reliable in a saved configuration: after `from_blip` it still names the dense model.
    named = [
        (getattr(config, "auto_map", None) or {}).get("AutoModel"),
        *(getattr(config, "architectures", None) or []),
    ]
    for name in filter(None, named):
        model_class = name.rpartition(".")[2]
        task = tasks.get(model_class.removeprefix("Madtp").lower())
        if task is not None:
            return task, model_class
    expected = [task.model_class.__name__.removeprefix("Madtp") for task in TASKS.values()]
    raise ValueError(
        f"The configuration has architectures={getattr(config, 'architectures', None)!r}: expected one of"
        f" {', '.join(expected)}, or Madtp before these. Pass the configuration of a saved checkpoint."
    )


def make_batches(model, processor, rows: list[dict], batch_size: int):
    """Make batches that can be read many times: a list for a few samples, a `DataLoader` for many."""
    if TASKS[model.task].text_column is None:  # captioning: the collator needs captions, a forward pass doesn't
        rows = [{"captions": [""], **row} for row in rows]
    collator = TASKS[model.task].make_collator(model, processor)
    # A list will do as a data set, though torch's hints don't say so.
    loader = DataLoader[dict](rows, batch_size=batch_size, collate_fn=collator)  # type: ignore[arg-type]
    if len(rows) > IN_MEMORY:
        return loader
    return list(tqdm(loader, desc="reading images", unit=" batches", leave=False))
