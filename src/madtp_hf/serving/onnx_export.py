"""Export models to ONNX graphs, with a runner beside them.

Each task has a few graphs, cut where a server reuses a result: an image's states for several questions, a feature for
an index, keys and values for the next token. `onnx_runner.py`, which is written beside them, runs them without torch.
"""

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ..modeling import images as image_decoder
from ..modeling.madtp_blip_decoder import TAKES_FINISHED_MASKS
from ..modeling.versions import VERSION as __version__
from ..tasks import TASKS
from ..tasks.onnx_graphs import Graph, Sizes
from . import onnx_runner


FORMAT = 1  # version of onnx.json
TOLERANCE = 1e-3  # between a graph's outputs and the model's, absolute and relative


# All different, and none 1, so that the exporter doesn't equate two dimensions.
TRACED = Sizes(3, 7, 2, 5)
# Sizes at which graphs are compared with the model: the first step and a later one, short texts and the longest.
COMPARED = (Sizes(1, 3, 1, 0), Sizes(2, 10**6, 2, 0), Sizes(2, 6, 1, 4))


class Part(nn.Module):
    """A part of a model, as the module of a graph."""

    def __init__(self, model, run: Callable):
        super().__init__()
        self.model, self.run = model, run

    def forward(self, *inputs):
        return self.run(self.model, *inputs)


def _write_graph(model, name: str, graph: Graph, folder: Path) -> dict:
    """Export one graph to `folder` and return its entry in onnx.json."""
    import onnx

    # `Part.forward` has one argument, `*inputs`, which holds them all.
    shapes = (tuple(dict.fromkeys(dims, torch.export.Dim.DYNAMIC) for _, dims in graph.inputs.values()),)
    module = Part(model, graph.run).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries warn about each other
        program = torch.onnx.export(
            module,
            graph.examples,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=list(graph.inputs),
            output_names=graph.outputs,
            verbose=False,
        )
    file = f"{name}.onnx"
    program.save(folder / file)
    written = onnx.load(folder / file, load_external_data=False).graph
    names = {}  # the exporter's dimension names, such as `s77` -> ours
    for value in written.input:
        for index, called in graph.inputs[value.name][1].items():
            names[value.type.tensor_type.shape.dim[index].dim_param] = called

    def facts(values):
        return {
            value.name: {
                "dtype": onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                "shape": [
                    names.get(d.dim_param, d.dim_param) or d.dim_value for d in value.type.tensor_type.shape.dim
                ],
            }
            for value in values
        }

    return {"file": file, "what": graph.what, "inputs": facts(written.input), "outputs": facts(written.output)}


def _compare(model, name: str, graph: Graph, folder: Path) -> None:
    """Raise a `RuntimeError` unless a graph reproduces the model's outputs, at sizes that it was not traced with."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
    taken = {node.name for node in session.get_inputs()}
    feed = {key: example.numpy() for key, (example, _) in graph.inputs.items() if key in taken}
    with torch.no_grad():
        expected = graph.run(model, *graph.examples)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for output, mine, theirs in zip(graph.outputs, map(torch.from_numpy, session.run(graph.outputs, feed)), expected):
        if mine.shape != theirs.shape or not torch.allclose(mine, theirs, atol=TOLERANCE, rtol=TOLERANCE):
            raise RuntimeError(
                f"The exported {name} gives another {output} {tuple(mine.shape)} than the model {tuple(theirs.shape)}:"
                f" nothing was written; try another version of torch than {torch.__version__}, or of onnxscript."
            )


def _check(model) -> None:
    """Raise an error for a model that can't be exported."""
    if getattr(model, "task", None) not in TASKS:
        raise TypeError(f"export_onnx got a {type(model).__name__}: expected one of madtp_hf's models.")
    if model.is_pruning and model.config.pruning_granularity != "frozen":
        raise ValueError(
            "This model keeps a number of tokens that depends on its input, which a graph can't: freeze it with"
            " `madtp_hf.calibrate(model, dataloader, reductions, freeze=True)`, or switch pruning off with"
            " `set_pruning(None)`."
        )
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise ValueError(
            f"The model is on {model.device} in {model.dtype}: expected a CPU and torch.float32; call"
            " model.to('cpu', torch.float32) first."
        )
    if hasattr(model, "text_decoder") and not TAKES_FINISHED_MASKS:
        raise ImportError("The decoder's graph needs a newer transformers: pip install -U transformers.")


def _describe(model, graphs: dict[str, dict]) -> dict:
    """Return the content of onnx.json."""
    config, text_config = model.config, model.config.text_config
    counts = model.start_pass().token_counts
    description = {
        "format": FORMAT,
        "madtp_version": __version__,
        "task": model.task,
        "image_size": config.vision_config.image_size,
        "max_text_length": text_config.max_position_embeddings,
        "token_counts": counts and {name: list(numbers) for name, numbers in counts.items()},
        "graphs": graphs,
    }
    if hasattr(model, "text_decoder"):
        heads = text_config.num_attention_heads
        description["decoder"] = {
            "start_token_id": text_config.bos_token_id,
            "end_token_id": text_config.sep_token_id,
            "pad_token_id": text_config.pad_token_id,
            "num_layers": text_config.num_hidden_layers,
            "num_heads": heads,
            "head_width": text_config.hidden_size // heads,
        }
    if hasattr(model, "logit_scale"):
        description["logit_scale"] = model.logit_scale.exp().item()
    return description


@contextmanager
def _as_traced(model):
    """Prepare a model for tracing: evaluation mode, weights not prepacked; on exit restore its mode."""
    training = model.training
    model.eval().prepack_weights(False)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        model.train(training)


def export_onnx(model, processor, out, *, force: bool = False) -> Path:
    """Export a model to ONNX graphs, with its processor and a runner.

    The folder gets the task's graphs, `onnx.json`, which describes their inputs and outputs, the tokenizer and image
    processor files, and `onnx_runner.py`, which answers with onnxruntime and without torch. Every graph is compared
    with the model, at sizes other than those it was traced with, and the folder appears only when it is complete.
    Batch size, text lengths and the length of the decoder's past are dynamic. How many tokens each layer leaves is
    fixed, as in the model.

    Args:
        model: One of this package's models, on a CPU in float32: with frozen token counts, or with pruning off.
        processor: Its processor, of images and texts.
        out: The folder to write: new, or empty.
        force: Replace the folder, and all that is in it.

    Returns:
        The folder.

    Raises:
        ImportError: without onnx, onnxscript and onnxruntime.
        TypeError: for another model.
        ValueError: for a model whose token counts aren't fixed or that isn't on a CPU in float32, or a folder that
            isn't empty.
        RuntimeError: if a graph's outputs differ from the model's.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("Export needs onnx, onnxscript and onnxruntime: pip install 'madtp_hf[export]'.") from error
    _check(model)
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not force)):
        raise ValueError(f"{out} exists and is not an empty folder: choose another, or pass `force=True`.")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written beside `out`, so that renaming puts it in place in one step.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        with _as_traced(model):
            make = TASKS[model.task].onnx_graphs
            graphs = {name: _write_graph(model, name, graph, made) for name, graph in make(model, TRACED).items()}
            for sizes in COMPARED:
                for name, graph in make(model, sizes).items():
                    _compare(model, name, graph, made)
        processor.save_pretrained(made)
        (made / onnx_runner.DESCRIPTION).write_text(json.dumps(_describe(model, graphs), indent=2) + "\n")
        for module in (onnx_runner, image_decoder):
            shutil.copy(module.__file__, made / Path(module.__file__).name)
        if out.exists():
            out.rename(Path(scratch, "replaced"))
        made.rename(out)
    return out
