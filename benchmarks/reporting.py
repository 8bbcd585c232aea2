"""Results of benchmarks: JSON files with machine and versions, tables, pictures."""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from madtp_hf import __version__


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EXAMPLES = ROOT / "examples"
CPU = torch.device("cpu")


def make_parser(description: str, output: str | None = None) -> argparse.ArgumentParser:
    """Return a parser with `--output`, the JSON file; `output` is its default name in benchmarks/results/."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output",
        type=Path,
        default=output and RESULTS / output,
        help="The JSON file to write." + (f" Default: benchmarks/results/{output}." if output else ""),
    )
    return parser


def settings_of(args, *hidden: str) -> dict:
    """Return a script's options for its file, without `output` and the hidden ones."""
    plain = (str, int, float, bool, list, tuple, type(None))
    found = {name: value for name, value in vars(args).items() if name not in ("output", *hidden)}
    return {name: value if isinstance(value, plain) else str(value) for name, value in found.items()}


# Files


def environment(device: torch.device = CPU, packages: Iterable[str] = ()) -> dict:
    """Return what a file says about where it was measured: `machine` and `versions`."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        processor = names[0] if names else processor
    versions = {"madtp_hf": __version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)}
    return {
        "machine": {
            "processor": processor,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        },
        "versions": versions,
    }


def write_json(path: Path | None, content: dict) -> None:
    """Write a file with a line for each row and each setting; under another name first, so that none is half-written.

    Keys of dictionaries must be strings.
    """
    if path is None:
        return

    def text(value) -> str:
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            return "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
        if isinstance(value, dict) and value:
            return (
                "{\n" + ",\n".join(f"    {json.dumps(key)}: {json.dumps(of)}" for key, of in value.items()) + "\n  }"
            )
        return json.dumps(value)

    lines = [f"  {json.dumps(name)}: {text(value)}" for name, value in content.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    part.replace(path)


class Rows:
    """The rows of a study in a JSON file, which is rewritten with every new row: an interrupted run resumes.

    Args:
        path (`Path`, *optional*): The file; None keeps the rows in memory.
        header (`dict`): What the file says besides its rows, `settings` among it.
        key (`tuple[str, ...]`): The columns that tell rows apart.
        same (`str`): The entries of the header that rows of one file share.

    A file of other settings ends the program with a message that names both.
    """

    def __init__(self, path: Path | None, header: dict, key: tuple[str, ...], same: tuple[str, ...] = ("settings",)):
        self.path, self.header, self.key = path and Path(path), header, key
        self.rows: dict[tuple, dict] = {}
        if self.path is None or not self.path.exists():
            return
        before = json.loads(self.path.read_text())
        for name in same:
            if before.get(name) != json.loads(json.dumps(header[name])):
                sys.exit(
                    f"{self.path} has rows of {name} {before.get(name)}, not {header[name]}: expected the same."
                    " Pass those, or another --output."
                )
        self.rows = {self.key_of(row): row for row in before["rows"]}

    def key_of(self, row: dict) -> tuple:
        return tuple(row.get(name) for name in self.key)

    def __contains__(self, key: tuple) -> bool:
        return key in self.rows

    def forget(self, keys: Iterable[tuple]) -> None:
        """Make these rows again; the file has them until the next row is added."""
        for key in keys:
            self.rows.pop(key, None)

    def add(self, *rows: dict, **header) -> None:
        self.header |= header
        self.rows |= {self.key_of(row): row for row in rows}
        write_json(self.path, {**self.header, "rows": list(self.rows.values())})


# Tables


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """Return the mean and, of several values, the standard deviation."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def show(value, form: str = "") -> str:
    """Format a cell of a table; None is empty."""
    return "" if value is None else format(value, form) if form else str(value)


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable]) -> None:
    """Print a table whose first column is aligned left and the others right."""
    lines = [[show(cell) for cell in row] for row in ([*columns], *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}")
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        print("  ".join(cells).rstrip(), flush=True)


def markdown(columns: Iterable[str], rows: Iterable[Iterable], left: int = 1) -> list[str]:
    """Return the lines of a Markdown table whose first `left` columns are aligned left and the others right."""
    columns = [*columns]
    rules = ["---" if index < left else "---:" for index in range(len(columns))]
    return ["| " + " | ".join(columns) + " |", "|" + "|".join(rules) + "|"] + [
        "| " + " | ".join(show(cell) for cell in row) + " |" for row in rows
    ]


# Pictures


def draw_panels(lines: list[list], draw: Callable, size: tuple[float, float], output: Path) -> None:
    """Draw `draw(axes, panel)` for each panel of each line of a grid, with one legend below, and save the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns, (width, height) = max(map(len, lines)), size
    figure, grid = pyplot.subplots(
        len(lines),
        columns,
        figsize=(width * columns, height * len(lines) + 0.8),
        squeeze=False,
        layout="constrained",
    )
    handles = {}
    for row, panels in zip(grid, lines):
        for axes, panel in zip(row, panels):
            draw(axes, panel)
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels())))
        for axes in row[len(panels) :]:
            axes.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, columns + 1), fontsize=8)
    figure.savefig(output, dpi=140)
    pyplot.close(figure)
    print(f"Wrote {output}.")
