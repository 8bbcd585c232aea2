"""Load a model with its processor from any source: a folder or Hub id, of transformers' BLIP or CLIP or of ours."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PretrainedConfig, ProcessorMixin

from ..modeling.pruned_model import PrunedModelMixin
from ..tasks import TASKS, Task, get_task, task_of


HUB_TIMEOUT = 10  # seconds for the one request that finds a model on the Hub
_EXPECTED = "expected a checkpoint's folder, or the id of a model on the Hub"
_ALIGNMENT_SHAPE = ("num_alignment_tokens", "alignment_dim")


@dataclass
class Loaded:
    """A model with its processor.

    model: one of this package's models, in evaluation mode; processor: of images and texts; task: the model's;
    is_dense: whether the alignment tokens are new, as for transformers' checkpoints; is_trained: False if the source
    is of another task, and what only this task has is new; source: the folder's absolute path, or the Hub id;
    revision: the commit on the Hub, None for a folder.
    """

    model: PrunedModelMixin
    processor: ProcessorMixin
    task: Task
    is_dense: bool
    is_trained: bool
    source: str
    revision: str | None

    def require_trained(self) -> "Loaded":
        """Return this; raise a `ValueError` if a part of the model is new and would answer at random."""
        if not self.is_trained:
            raise ValueError(
                f"{self.source} is not a checkpoint for {self.task.name!r}, and nothing is trained here: expected one"
                f" for that task. Leave the task out, or fine-tune the checkpoint with examples/{self.task.script}."
            )
        return self


def load(
    source: str | Path,
    task: str | Sequence[str] | None = None,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    precision: str | None = None,
    **config_overrides,
) -> Loaded:
    """Load the model for a checkpoint's task, and its processor.

    Args:
        source (`str` or `Path`): A folder or a Hub id: a BLIP or CLIP of transformers, or a checkpoint of this
            package.
        task (`str` or `tuple` of `str`, *optional*): The task that is expected, or several, of `madtp_hf.tasks.TASKS`.
            By default any task.
        revision (`str`, *optional*): The branch, tag or commit on the Hub.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`): The dtype to compute in.
        device (`str` or `torch.device`, *optional*): By default a GPU if there is one, else the CPU.
        precision (`str`, *optional*): What to prepare the model for, as in `model.prepare_for_inference`; by default
            it is left as it is.
        config_overrides: Fields of the configuration. A calibrated checkpoint keeps its alignment tokens, whatever
            `num_alignment_tokens` and `alignment_dim` say; for another they are new, in that shape.

    Returns:
        [`Loaded`]: `model`, `processor`, `task`, `is_dense`, `is_trained`, `source` and `revision`.

    Raises:
        FileNotFoundError: if there is no such folder, or no such model on the Hub or in its cache.
        ValueError: if the checkpoint is of another model or task, or lacks a file, or the dtype is unknown.
    """
    wanted = [get_task(name) for name in ([task] if isinstance(task, str) else task or ())]
    to_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(to_dtype, torch.dtype) or not to_dtype.is_floating_point:
        raise ValueError(f"dtype={dtype!r}: expected float32, bfloat16 or float16.")
    source, hub = _find(source, revision)
    found, class_name, content = _find_task(source, hub, wanted)
    model_class = found.model_class
    shape = {name: config_overrides[name] for name in _ALIGNMENT_SHAPE if name in config_overrides}
    if content.get("pruning_schedule"):
        config_overrides = {name: value for name, value in config_overrides.items() if name not in shape}
        shape = {}
    is_dense = not class_name.startswith("Madtp") or any(content.get(name) != shape[name] for name in shape)
    make = model_class.from_dense if is_dense else model_class.from_pretrained
    model = make(source, dtype=to_dtype, **hub, **config_overrides)
    # A model made from a dense one does not record where it came from.
    model.config.name_or_path, model.config._commit_hash = source, hub.get("revision")
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    try:
        processor = found.family.processor_class.from_pretrained(source, **hub)
    except OSError as error:
        raise ValueError(
            f"{source} has no complete processor ({_first_line(error)}): save one with `processor.save_pretrained`."
        ) from error
    if precision is not None:
        model.prepare_for_inference(precision)
    is_trained = not class_name or task_of(SimpleNamespace(**content))[0] is found
    return Loaded(model, processor, found, is_dense, is_trained, source, hub.get("revision"))


def _find(source, revision: str | None) -> tuple[str, dict]:
    """Return a folder's absolute path or a Hub id, and the options with which all of its files are of one commit.

    The Hub is asked once, without the retries of each file's download; without an answer, its cache has to do.
    """
    path, name = Path(source).expanduser(), str(source)
    if path.is_dir():
        return str(path.resolve()), {}
    is_path = not isinstance(source, str) or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1
    if is_path or path.exists() or (len(path.parts) > 1 and path.parent.exists()):
        problem = "is not a directory" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{source} {problem}: {_EXPECTED}.")
    try:
        validate_repo_id(name)
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
        config = hf_hub_download(name, "config.json", revision=revision)  # the cache notes the revision's commit
        return name, {"revision": Path(config).parent.name}
    except HFValidationError as error:
        raise FileNotFoundError(f"{name!r} is not a directory and not a model's id: {_EXPECTED}.") from error
    except Exception as error:  # whatever the Hub's client raises for an answer or a connection
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(cached, str):
            raise FileNotFoundError(
                f"{name} is not a directory, and can't be read from the Hub ({_first_line(error)}): {_EXPECTED}."
            ) from error
        return name, {"revision": Path(cached).parent.name, "local_files_only": True}


def _find_task(source: str, hub: dict, wanted: list[Task]) -> tuple[Task, str, dict]:
    """Return the task to load a checkpoint for, the name of the checkpoint's class, and its configuration."""
    content: dict = {}
    reason = "it has no config.json"
    try:
        content, _ = PretrainedConfig.get_config_dict(source, **hub)
    except OSError as error:
        reason = _first_line(error)
    if not content:
        raise ValueError(
            f"{source} can't be loaded ({reason}): expected a folder with a config.json, or a model on the Hub."
        )
    named = (content.get("architectures") or [f"model of type {content.get('model_type')!r}"])[0]
    try:
        found, class_name = task_of(SimpleNamespace(**content))
    except ValueError:
        if named.startswith("model of type") and len(wanted) == 1 and _is_of(wanted[0], content):
            return wanted[0], "", content  # no class is named, so try the task that is expected
        classes = ", ".join(name for task in wanted or TASKS.values() for name in _class_names(task))
        raise ValueError(f"{source} is a {named}: expected a checkpoint of one of {classes}.") from None
    if wanted and found not in wanted:
        if len(wanted) > 1 or class_name not in _class_names(wanted[0]):
            tasks = " or ".join(repr(task.name) for task in wanted)
            raise ValueError(
                f"{source} has a {class_name}, for {found.name!r}, and the task is {tasks}: expected a checkpoint for"
                f" that task."
            )
        found = wanted[0]
    return found, class_name, content


def _is_of(task: Task, content: dict) -> bool:
    types = task.family.config_class.model_type, task.family.dense_config_class.model_type
    return content.get("model_type") in types


def _class_names(task: Task) -> list[str]:
    """Return the names of the classes whose checkpoints become a task's model."""
    return [model_class.__name__ for model_class in (task.model_class, *task.model_class._dense_classes)]


def _first_line(error: Exception) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__).rstrip(".")
