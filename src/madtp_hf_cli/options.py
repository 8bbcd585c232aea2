"""The options that commands share: for each thing one name, one help text and one check."""

import re
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Dtypes(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Precisions(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def _check_device(device: str | None) -> str | None:
    """Raise a `typer.BadParameter` for a device that torch can't compute on here."""
    if device is None:
        return None
    import torch

    try:
        known = torch.device(device).type != "meta"
    except RuntimeError:
        known = False
    if not known:
        raise typer.BadParameter(f"{device!r} is not a device: expected a name such as cpu, cuda, cuda:1 or mps.")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise typer.BadParameter(f"{device!r} is not available ({reason}): leave it out, or use cpu.") from None
    return device


def parse_memory(text: str | int) -> int:
    """Parse `"2GB"`, `"500 MiB"` or `"2e9"` as a number of bytes; units are powers of 1024."""
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmgt]?)i?b?\s*", str(text), re.IGNORECASE)
    try:
        size = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    except ValueError:
        size = 0
    if size <= 0:
        raise typer.BadParameter(f"{text!r} is not a size: expected a number with a unit, such as 2GB or 500MB.")
    return size


def _parse_column(text: str) -> tuple[str, str]:
    kind, equals, name = text.partition("=")
    if not (kind and equals and name):
        raise typer.BadParameter(f"{text!r}: expected KIND=NAME, such as image=photo or question=query.")
    return kind, name


def _check_share(share: float | None) -> float | None:
    if share is not None and not 0 < share <= 1:
        raise typer.BadParameter(f"{share:g}: expected a number above 0 and at most 1.")
    return share


def _check_temperature(temperature: float | None) -> float | None:
    if temperature is not None and not 0 < temperature < float("inf"):
        raise typer.BadParameter(
            f"{temperature:g}: expected a number above 0; for greedy search, leave --do-sample out."
        )
    return temperature


def how_to_read(image_dir: Path | None, columns: list | None, skip_unreadable: bool) -> dict:
    """Return the arguments of `load_rows` that these options stand for."""
    on_error = "skip" if skip_unreadable else "raise"
    return {"image_dir": image_dir, "columns": dict(columns) if columns else None, "on_error": on_error}


# What to read.
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A BLIP or CLIP, pruned or dense: folder or Hub id.")]
Images = Annotated[
    str,
    typer.Argument(metavar="IMAGES", help="A folder, table, *.parquet, tars (x-{0..9}.tar) or data set."),
]
Data = Annotated[
    str, typer.Option(metavar="PATH", help="A folder of images, a table such as .csv or .jsonl, or digits.")
]
Text = Annotated[str | None, typer.Option("--text", "--question", metavar="TEXT", help="For images without a text.")]
Question = Annotated[str | None, typer.Option("--question", "--text", metavar="TEXT", help="Ask this of every image.")]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", "--question", metavar="TEXT", help="For images without a text; may be repeated."),
]
ImageDir = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Where a table's image paths start; by default its folder.")
]
Columns = Annotated[
    list[str] | None,
    typer.Option(metavar="KIND=NAME ...", parser=_parse_column, help="A table's columns, such as image=photo."),
]
Split = Annotated[str | None, typer.Option(metavar="NAME", help="The split of a data set.")]
Samples = Annotated[int | None, typer.Option(metavar="N", min=1, help="Draw this many samples; all by default.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of random draws.")]
SkipUnreadable = Annotated[
    bool, typer.Option("--skip-unreadable", help="Leave out rows that can't be read; exit code 3.")
]
MaxPixels = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Largest image to read; by default 89 million pixels.")
]

# How to compute.
Task = Annotated[str | None, typer.Option(metavar="TASK", help="The task, if it isn't the checkpoint's own.")]
Method = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD", help="madtp, madtp_merge, tome, evit, class_attention or random; by default as saved."
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(metavar="METHOD ...", help="Compare methods, each calibrated on the data, without labels."),
]
Reduction = Annotated[
    float | None, typer.Option(metavar="R", help="Share of FLOPs to save, such as 0.5; 0 is off; by default as saved.")
]
Reductions = Annotated[
    list[float] | None,
    typer.Option(metavar="R ...", help="Shares of FLOPs to save; by default 0 and the calibrated ones."),
]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Samples per forward pass.")]
AutoBatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", metavar="N", min=1, help="Samples per forward pass."),
]
Memory = Annotated[
    int | None,
    typer.Option(metavar="SIZE", parser=parse_memory, help="Memory for a batch, such as 2GB; sets the batch size."),
]
Workers = Annotated[
    int | None, typer.Option(metavar="N", min=0, help="Processes that decode images; by default up to 8.")
]
Ray = Annotated[int | None, typer.Option(metavar="N", min=1, help="Number of models on Ray, at RAY_ADDRESS or here.")]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", callback=_check_device, help="Such as cpu or cuda:1; by default a GPU if there is one."
    ),
]
Dtype = Annotated[Dtypes, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16.")]
AutoDtype = Annotated[
    Dtypes | None,
    typer.Option(metavar="TYPE", help="float32, bfloat16 or float16.", show_default="bfloat16 on a GPU"),
]
Precision = Annotated[
    Precisions, typer.Option(metavar="TYPE", help="Of linear layers: auto, float32, bfloat16 or int8 (CPU).")
]
Revision = Annotated[str | None, typer.Option(metavar="REVISION", help="Branch, tag or commit of MODEL on the Hub.")]

# How texts are generated.
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Longest generated text, in tokens.")]
NumBeams = Annotated[int, typer.Option(metavar="N", min=1, help="Beams to search; 1 is greedy.")]
DoSample = Annotated[bool, typer.Option("--do-sample", help="Sample tokens instead of greedy or beam search.")]
Temperature = Annotated[
    float | None,
    typer.Option(metavar="T", callback=_check_temperature, help="Sampling temperature; needs --do-sample."),
]
TopP = Annotated[
    float | None, typer.Option(metavar="P", callback=_check_share, help="Nucleus (top-p) sampling; needs --do-sample.")
]

# What to write.
OutFolder = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write: new, or empty.")]
OutFile = Annotated[Path, typer.Argument(metavar="OUT", help="A .parquet, .jsonl or .csv; with --suffix, a folder.")]
Suffix = Annotated[str | None, typer.Option(metavar=".txt", help="Write a file per image: OUT/a/b.txt for a/b.jpg.")]
RetryErrors = Annotated[bool, typer.Option("--retry-errors", help="Retry rows that failed before.")]
Force = Annotated[bool, typer.Option("--force", help="Start over, and replace existing output.")]
