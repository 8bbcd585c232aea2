"""Export models to ONNX graphs, with a runner beside them.

Each task has a few graphs, cut where a server reuses a result: an image's states for several questions, a feature for
an index, keys and values for the next token. A task's file says which. `onnx_runner.py`, which is written beside them,
runs them without torch.
"""

import inspect
import json
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from ..modeling import images as image_decoder
from ..modeling import texts as text_reader
from ..modeling.madtp_blip_decoder import TAKES_FINISHED_MASKS
from ..modeling.versions import VERSION as __version__
from ..tasks import TASKS
from ..tasks.onnx_parts import COMPARED, TRACED, Graph
from . import onnx_runner


FORMAT = 1  # version of onnx.json
TOLERANCE = 1e-3  # between a graph's outputs and the model's, absolute and relative
PRECISIONS = ("float32", "int8")
# Weights that stay in float32 in an int8 graph: those that decide which tokens stay, and the heads.
SENSITIVE = re.compile(r"\balignment\b|head\.|\b(vision|text)_proj\b|\b(visual|text)_projection\.weight|predictions\.")


class Part(nn.Module):
    """A part of a model, as the module of a graph."""

    def __init__(self, model, run: Callable):
        super().__init__()
        self.model, self.run = model, run

    def forward(self, *inputs):
        return self.run(self.model, *inputs)


def _write_graph(model, name: str, graph: Graph, folder: Path) -> tuple[dict, list[str]]:
    """Export one graph to `folder`; return its entry in onnx.json, and the nodes that stay in float32 in int8."""
    import onnx
    from onnxscript import optimizer

    # `Part.forward` has one argument, `*inputs`, which holds them all.
    shapes = (tuple(dict.fromkeys(dims, torch.export.Dim.DYNAMIC) for _, dims in graph.inputs.values()),)
    module = Part(model, graph.run).eval()
    with torch.no_grad():
        program = torch.onnx.export(
            module,
            graph.examples,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=list(graph.inputs),
            output_names=graph.outputs,
            verbose=False,
            optimize=False,  # its rewriting takes a third of the time, and onnxruntime does the same at loading
        )
    assert program is not None  # as it is with `dynamo=True`
    sensitive = _sensitive_nodes(program.model.graph)
    optimizer.fold_constants(program.model)
    optimizer.remove_unused_nodes(program.model)
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

    return {
        "file": file,
        "what": graph.what,
        "inputs": facts(written.input),
        "outputs": facts(written.output),
    }, sensitive


def _sensitive_nodes(graph) -> list[str]:
    """Return the names of the products by weights that stay in float32 in int8."""
    read_by: dict = {}  # for each value that is computed from weights alone, their names; None for other values

    def weights(value) -> set[str] | None:
        if value not in read_by:
            producer = value.producer()
            if producer is None:
                read_by[value] = {value.name} if value.is_initializer() else None
            else:
                found = [weights(each) for each in producer.inputs if each is not None]
                known = [names for names in found if names is not None]
                read_by[value] = set().union(*known) if len(known) == len(found) else None
        return read_by[value]

    return [
        node.name
        for node in graph  # in topological order, so that `weights` doesn't recurse deeply
        for found in [[weights(value) or () for value in node.inputs if value is not None]]
        if node.op_type in ("MatMul", "Gemm") and any(SENSITIVE.search(name) for names in found for name in names)
    ]


def _compare(model, name: str, graph: Graph, folder: Path) -> float:
    """Return how far a graph's outputs are from the model's, at most, as a share of their root mean square.

    The sizes are not those that the graph was traced with. Raise a `RuntimeError` if a shape differs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
    taken = {node.name for node in session.get_inputs()}
    feed = {key: example.numpy() for key, (example, _) in graph.inputs.items() if key in taken}
    with torch.no_grad():
        expected = graph.run(model, *graph.examples)
    expected = expected if isinstance(expected, tuple) else (expected,)
    worst = 0.0
    for output, mine, theirs in zip(graph.outputs, map(torch.from_numpy, session.run(graph.outputs, feed)), expected):
        if mine.shape != theirs.shape:
            raise _differs(name, f"{output} has shape {tuple(mine.shape)} instead of {tuple(theirs.shape)}")
        mine, theirs = mine.float(), theirs.float()
        distance = (mine - theirs).square().mean().sqrt() / theirs.square().mean().sqrt().clamp(min=1e-6)
        worst = max(worst, distance.nan_to_num(float("inf")).item())
    return worst


def _differs(name: str, how: str) -> RuntimeError:
    return RuntimeError(
        f"The exported {name} differs from the model: {how}. Nothing was written; try another version of torch than"
        f" {torch.__version__}, or of onnxscript."
    )


def _quantize(name: str, sensitive: list[str], folder: Path) -> None:
    """Replace a graph by one whose weights are int8, per channel, and whose activations are quantized as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    file, prepared = folder / f"{name}.onnx", folder / f"{name}.prepared.onnx"
    quant_pre_process(file, prepared, skip_optimization=True, skip_symbolic_shape=True)
    file.unlink()
    quantize_dynamic(
        prepared,
        file,
        op_types_to_quantize=["MatMul"],  # and Gemm, which it turns into MatMul
        per_channel=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=sensitive + [f"{node}_MatMul" for node in sensitive],  # the same, once they were Gemm
    )
    prepared.unlink()


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


def _describe(model, graphs: dict[str, dict], precision: str) -> dict:
    """Return the content of onnx.json."""
    config, text_config = model.config, model.config.text_config
    counts = model.start_pass().token_counts
    description = {
        "format": FORMAT,
        "madtp_version": __version__,
        "task": model.task,
        "precision": precision,
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
    if model.task == "clip":
        description["logit_scale"] = model.logit_scale.exp().item()
    return description


@contextmanager
def _quiet():
    """Silence what libraries say about each other while they export, by warnings and by their loggers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "root")]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels):
            each.setLevel(level)


@contextmanager
def _as_traced(model):
    """Prepare a model for tracing: evaluation mode, weights not prepared; on exit restore both."""
    training, precision = model.training, model.inference_precision
    model.eval().prepare_for_inference(None)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        model.train(training).prepare_for_inference(precision)


def _write_graphs(model, folder: Path, precision: str) -> dict[str, dict]:
    """Export a model's graphs, compare them with it, and quantize them if asked; return their entries in onnx.json."""
    make = TASKS[model.task].graphs
    graphs, examples = {}, [make(model, sizes) for sizes in COMPARED]

    def worst(name: str) -> float:
        return max(_compare(model, name, of_sizes[name], folder) for of_sizes in examples)

    with tqdm(make(model, TRACED).items(), desc="exporting", unit=" graphs", leave=False) as progress:
        for name, graph in progress:
            progress.set_postfix_str(name)
            graphs[name], sensitive = _write_graph(model, name, graph, folder)
            if (distance := worst(name)) > TOLERANCE:
                raise _differs(name, f"the outputs differ by {distance:.2g} of their size")
            if precision == "int8":
                _quantize(name, sensitive, folder)
                graphs[name]["int8_error"] = round(worst(name), 4)
    return graphs


def export_onnx(model, processor, out, *, precision: str = "float32", force: bool = False) -> Path:
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
        precision: `"float32"`, or `"int8"`: weights in 8 bits per channel and activations quantized at run time, by
            onnxruntime, but for the alignment scores and the heads. How far a graph's outputs are then from the
            model's, at most, as a share of their root mean square, is its `"int8_error"` in onnx.json.
        force: Replace the folder, and all that is in it.

    Returns:
        The folder.

    Raises:
        ImportError: without onnx, onnxscript and onnxruntime.
        TypeError: for another model.
        ValueError: for a model whose token counts aren't fixed or that isn't on a CPU in float32, an unknown
            precision, or a folder that isn't empty.
        RuntimeError: if a graph's outputs differ from the model's.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("Export needs onnx, onnxscript and onnxruntime: pip install 'madtp_hf[export]'.") from error
    _check(model)
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(PRECISIONS)}.")
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not force)):
        raise ValueError(f"{out} exists and is not an empty folder: choose another, or pass `force=True`.")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written beside `out`, so that renaming puts it in place in one step.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        with _quiet(), _as_traced(model):
            graphs = _write_graphs(model, made, precision)
        processor.save_pretrained(made)
        (made / onnx_runner.DESCRIPTION).write_text(json.dumps(_describe(model, graphs, precision), indent=2) + "\n")
        for module in (onnx_runner, image_decoder, text_reader):
            shutil.copy(inspect.getfile(module), made)
        if out.exists():
            out.rename(Path(scratch, "replaced"))
        made.rename(out)
    return out
