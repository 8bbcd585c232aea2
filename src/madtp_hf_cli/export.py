"""`madtp-hf export`: export a checkpoint to ONNX graphs."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .common import check_out


def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The folder of a checkpoint, frozen or dense.")],
    out: options.OutFolder,
    onnx: Annotated[bool, typer.Option("--onnx", help="The only format.")] = True,
    reduction: options.Reduction = None,
    force: options.Force = False,
) -> None:
    """Write a checkpoint as ONNX graphs, with onnx.json, processor files and a runner.

    The token counts of a pruned model have to be frozen: `calibrate(..., freeze=True)`. The runner answers with
    onnxruntime, without torch.

    Example: madtp-hf export blip-vqa blip-vqa-onnx --onnx --reduction 0.5
    """
    out = out.resolve()
    check_out(out, model, force)
    from madtp_hf.checkpoints.push import find_checkpoint_files
    from madtp_hf.serving.onnx_export import export_onnx
    from madtp_hf.tasks import TASKS

    find_checkpoint_files(model)
    loaded, processor = _load(model, TASKS)
    if reduction is not None:
        loaded.set_pruning(reduction=reduction)
    try:
        export_onnx(loaded, processor, out, force=force)
    except (ImportError, RuntimeError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    counts = loaded.config.token_counts() if loaded.is_pruning else None
    pruned = "pruning off" if counts is None else f"{counts['vision'][-1]} image tokens left"
    typer.echo(f"{out}: {type(loaded).__name__}, {pruned}; run it with the folder's onnx_runner.py.")


def _load(folder: Path, tasks):
    """Load this package's model from a folder, and its processor."""
    import json

    from transformers import BlipProcessor, CLIPProcessor
    from transformers.utils import logging

    named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    task = next(task for task in tasks.values() if task.model_class.__name__ == named)
    processor_class = CLIPProcessor if task.family == "CLIP" else BlipProcessor
    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = task.model_class.from_pretrained(folder).float().eval()
    finally:
        if shows:
            logging.enable_progress_bar()
    return model, processor_class.from_pretrained(folder)
