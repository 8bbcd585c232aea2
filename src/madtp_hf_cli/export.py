"""`madtp-hf export`: export a checkpoint to ONNX graphs."""

from pathlib import Path
from typing import Annotated

import typer

from .common import check_out, one_message_of_errors


def export(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A saved checkpoint, frozen or to be exported dense.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write: new, or empty.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="The format, and the only one that there is.")] = True,
    reduction: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="The share of FLOPs to save, of those it was frozen at; 0 is off. As saved if not given.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT, and all that is in it.")] = False,
) -> None:
    """Write a checkpoint as ONNX graphs, with onnx.json, processor files and a runner.

    The token counts of a pruned model have to be frozen: `calibrate(..., freeze=True)`. The runner answers with
    onnxruntime, without torch.

    Example: madtp-hf export blip-vqa blip-vqa-onnx --onnx --reduction 0.5
    """
    with one_message_of_errors():
        from transformers.utils import logging

        from madtp_hf.checkpoints.load import load
        from madtp_hf.checkpoints.push import find_checkpoint_files
        from madtp_hf.serving.onnx_export import export_onnx

        logging.disable_progress_bar()  # of loading
        out = out.resolve()
        check_out(out, model, force)
        find_checkpoint_files(model)
        loaded = load(model, device="cpu")
        if reduction is not None:
            loaded.model.set_pruning(reduction=reduction)
        try:
            export_onnx(loaded.model, loaded.processor, out, force=force)
        except (ImportError, RuntimeError) as error:
            raise ValueError(" ".join(str(error).split())) from error
    exported = loaded.model
    counts = exported.config.token_counts() if exported.is_pruning else None
    pruned = "pruning off" if counts is None else f"{counts['vision'][-1]} image tokens left"
    typer.echo(f"{out}: {type(exported).__name__}, {pruned}; run it with onnx_runner.py in there.")
