"""`madtp-hf search`: find the images of an index that are nearest to words or to an image."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from . import options


def search(
    folder: Annotated[Path, typer.Argument(metavar="INDEX", help="A folder that `madtp-hf index` wrote.")],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="Words, or the path of an image.")],
    top_k: Annotated[int, typer.Option("--top-k", "-k", metavar="N", min=1, help="How many images to find.")] = 10,
    rerank: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Re-rank this many by BLIP's matching head; by default as many as -k."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The index's model, if its folder has moved.")
    ] = None,
    device: options.Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Find the images of an index that are nearest to words or to an image.

    Example: madtp-hf search photos-index "a dog on a beach"
    """
    from transformers.utils import logging

    from madtp_hf.data.image_files import is_image as is_image_name
    from madtp_hf.search import load_index
    from madtp_hf.search import search as find
    from madtp_hf.search.index import load_of_index

    logging.disable_progress_bar()  # of loading
    index = load_index(folder)
    loaded = load_of_index(index.info, model, device)
    is_image = os.path.isfile(query) or is_image_name(query)
    found = find(index, Path(query) if is_image else query, top_k, rerank, loaded.model, loaded.processor)
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    reranked = any(hit["matching"] is not None for hit in found)
    names = ("score", "matching", "similarity") if reranked else ("similarity",)
    for name in names:
        table.add_column(name, justify="right")
    # A truncated path is of no use, so it is folded over several lines.
    table.add_column("image", overflow="fold")
    for hit in found:
        numbers = [hit[name] for name in names]
        table.add_row(*("-" if number is None else f"{number:.4f}" for number in numbers), hit["path"])
    Console(highlight=False, markup=False).print(table)
