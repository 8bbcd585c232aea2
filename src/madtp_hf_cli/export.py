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
    from transformers.utils import logging

    from madtp_hf.checkpoints.load import load
    from madtp_hf.checkpoints.push import find_checkpoint_files
    from madtp_hf.serving.onnx_export import export_onnx

    logging.disable_progress_bar()  # of loading
    find_checkpoint_files(model)
    loaded = load(model, device="cpu")
    exported = loaded.model
    if reduction is not None:
        exported.set_pruning(reduction=reduction)
    try:
        export_onnx(exported, loaded.processor, out, force=force)
    except (ImportError, RuntimeError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    counts = exported.start_pass().token_counts
    pruned = "pruning off" if counts is None else f"{counts['vision'][-1]} image tokens left"
    typer.echo(f"{out}: {type(exported).__name__}, {pruned}; run it with the folder's onnx_runner.py.")
