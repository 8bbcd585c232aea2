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
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ..modeling import images as image_decoder
from ..modeling.encoder import real_tokens
from ..modeling.madtp_blip_decoder import CACHE_ARGUMENT, TAKES_FINISHED_MASKS, cross_attention_cache
from ..modeling.sequences import Sequences
from ..modeling.versions import VERSION as __version__
from . import onnx_runner


FORMAT = 1  # version of onnx.json
# Names of the dynamic dimensions.
BATCH, LENGTH, STEP, PAST, TOTAL, KEPT = "batch", "length", "step", "past", "past + step", "kept"
TOLERANCE = 1e-3  # between a graph's outputs and the model's, absolute and relative


class Sizes(NamedTuple):
    """The sizes of an example: batch, text length, the decoder's new tokens, and the tokens already in its cache."""

    batch: int
    length: int
    step: int
    past: int


# All different, and none 1, so that the exporter doesn't equate two dimensions.
TRACED = Sizes(3, 7, 2, 5)
# Sizes at which graphs are compared with the model: the first step and a later one, short texts and the longest.
COMPARED = (Sizes(1, 3, 1, 0), Sizes(2, 10**6, 2, 0), Sizes(2, 6, 1, 4))


@dataclass
class Graph:
    """One graph to export.

    run: computes the graph's outputs from a model and the inputs; inputs: from each name to an example and the names
    of its dynamic dimensions, `{index: name}`; outputs: their names.
    """

    what: str
    run: Callable
    inputs: dict[str, tuple[torch.Tensor, dict[int, str]]]
    outputs: list[str]

    @property
    def examples(self) -> tuple[torch.Tensor, ...]:
        return tuple(example for example, _ in self.inputs.values())


class Part(nn.Module):
    """A part of a model, as the module of a graph."""

    def __init__(self, model, run: Callable):
        super().__init__()
        self.model, self.run = model, run

    def forward(self, *inputs):
        return self.run(self.model, *inputs)


def _pad_texts(model, input_ids, attention_mask):
    """Pad texts (B, L) to more tokens than any layer leaves, so that no shape depends on which of the two is smaller.

    This doesn't change the output: a frozen model ignores padding.
    """
    counts = model.config.token_counts() if model.is_pruning else None
    if counts is None:
        return input_ids, attention_mask
    shortest, longest = max(counts["text"]) + 1, model.config.text_config.max_position_embeddings
    width = torch.sym_max(input_ids.shape[1], shortest) if shortest < longest else longest
    return tuple(nn.functional.pad(x, (0, min(shortest, longest)))[:, :width] for x in (input_ids, attention_mask))


def _layout(states: torch.Tensor) -> tuple[torch.Tensor, Sequences]:
    """Return images' states (B, M, D) as the flat states and `Sequences` that an encoder takes."""
    return states.flatten(0, 1), Sequences.padded(*states.shape[:2], states.device)


# What the graphs compute


def _encode_images(model, pixel_values):
    return model._encode_images(pixel_values).hidden_states


def _encode_images_with_feature(model, pixel_values):
    images = model._encode_images(pixel_values)
    return images.hidden_states, model._image_feature(images)


def _for_decoder(model, encoded, masked: bool):
    """Return what the decoder reads of an encoder: a mask, and all layers' cross-attention keys and values."""
    mask = real_tokens(encoded)
    cache = cross_attention_cache(model.text_decoder, encoded.states, encoded.sequences)
    keys_and_values = [tensor for layer in cache.cross_attention_cache.layers for tensor in (layer.keys, layer.values)]
    # With pruning off, question answering's decoder attends to padding as well, as transformers' BLIP does.
    return (mask if masked else torch.ones_like(mask)).long(), *keys_and_values


def _encode_images_for_decoder(model, pixel_values):
    return _for_decoder(model, model._encode_images(pixel_values), True)


def _encode_questions(model, input_ids, attention_mask, image_states):
    texts = _pad_texts(model, input_ids, attention_mask)
    return _for_decoder(model, model._encode_text(*texts, *_layout(image_states)), model.is_pruning)


def _decode(model, input_ids, attention_mask, encoder_attention_mask, *keys_and_values):
    """Run one step of the decoder: n new tokens after p cached ones.

    Returns the logits (B, n, V) and the self-attention keys and values of all p + n tokens. Keys and values are taken
    and returned as key, value, key, ...; `keys_and_values` holds those of self-attention, then those of
    cross-attention.
    """
    half = len(keys_and_values) // 2
    caches = []
    for tensors in (keys_and_values[:half], keys_and_values[half:]):
        cache = DynamicCache()
        for layer in range(half // 2):
            cache.update(tensors[2 * layer], tensors[2 * layer + 1], layer)
        caches.append(cache)
    cache = EncoderDecoderCache(*caches)
    cache.is_updated = dict.fromkeys(range(half // 2), True)
    step, total = input_ids.shape[1], attention_mask.shape[1]
    queries = torch.arange(step, device=input_ids.device) + (total - step)
    slots, queries_column = torch.arange(total, device=input_ids.device), queries.unsqueeze(1)
    mask = attention_mask.bool()[:, None, None, :] & (slots <= queries_column)
    mask = mask | (slots == queries_column)  # for padding as well: a row without any key would give NaN
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0).index_select(1, queries)
    output = model.text_decoder(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        encoder_hidden_states=keys_and_values[half],  # only checked for presence: the cached keys and values are read
        encoder_attention_mask=encoder_attention_mask.bool()[:, None, None, :],
        use_cache=True,
        **{CACHE_ARGUMENT: cache},
    )
    layers = cache.self_attention_cache.layers
    return output.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))


def _classify_pairs(model, input_ids, attention_mask, left_states, right_states):
    texts = _pad_texts(model, input_ids, attention_mask)
    return model.cls_head(model._encode_text(*texts, *_layout(left_states), *_layout(right_states)).class_states)


def _encode_texts(model, input_ids, attention_mask):
    return model._text_feature(model._encode_text(*_pad_texts(model, input_ids, attention_mask)))


def _match(model, input_ids, attention_mask, image_states):
    texts = _pad_texts(model, input_ids, attention_mask)
    return model.itm_head(model._encode_text(*texts, *_layout(image_states)).class_states)


def _encode_clip_images(model, pixel_values):
    return nn.functional.normalize(model.get_image_features(pixel_values).pooler_output, dim=-1)


def _encode_clip_texts(model, input_ids, attention_mask):
    texts = _pad_texts(model, input_ids, attention_mask)
    return nn.functional.normalize(model.get_text_features(*texts).pooler_output, dim=-1)


# Their inputs and outputs


def _images(model, sizes: Sizes) -> dict:
    side = model.config.vision_config.image_size
    return {"pixel_values": (torch.randn(sizes.batch, 3, side, side), {0: BATCH})}


def _texts(model, sizes: Sizes) -> dict:
    dims, config = {0: BATCH, 1: LENGTH}, model.config.text_config
    length = min(sizes.length, config.max_position_embeddings)
    ids = torch.randint(4, config.vocab_size - 2, (sizes.batch, length))
    mask = torch.ones_like(ids)
    if sizes.batch > 1:
        mask[0, 2:] = 0  # a short text
    if model.task == "clip":
        ids[torch.arange(sizes.batch), mask.sum(dim=1) - 1] = config.eos_token_id
    return {"input_ids": (ids, dims), "attention_mask": (mask, dims)}


def _states(model, sizes: Sizes, *names: str) -> dict:
    """Return image states as the vision encoder outputs them; their number of tokens is fixed."""
    with torch.no_grad():
        states = _encode_images(model, _images(model, sizes)["pixel_values"][0])
    # Distinct tensors with different values: the exporter merges inputs that share a tensor.
    return {name: (states.roll(index, dims=1), {0: BATCH}) for index, name in enumerate(names)}


def _cache_names(model, kind: str, what: str) -> list[str]:
    layers = range(model.config.text_config.num_hidden_layers)
    return [f"{what}.{layer}.{kind}.{part}" for layer in layers for part in ("key", "value")]


def _decoder(model, sizes: Sizes, num_states: int, varies: bool) -> Graph:
    """Describe the decoder's graph.

    varies: whether the number of the encoder's states is dynamic.
    """
    config = model.config.text_config
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    ids = torch.randint(4, config.vocab_size - 2, (sizes.batch, sizes.step))
    mask = torch.ones(sizes.batch, sizes.past + sizes.step, dtype=torch.long)
    mask[-1, 0] = 0  # left padding
    states_mask = torch.ones(sizes.batch, num_states, dtype=torch.long)
    inputs = {
        "input_ids": (ids, {0: BATCH, 1: STEP}),
        "attention_mask": (mask, {0: BATCH, 1: TOTAL}),
        "encoder_attention_mask": (states_mask, {0: BATCH, 1: KEPT} if varies else {0: BATCH}),
    }
    cross_dims = {0: BATCH, 2: KEPT} if varies else {0: BATCH}
    for kind, number, dims in (("decoder", sizes.past, {0: BATCH, 2: PAST}), ("encoder", num_states, cross_dims)):
        # Distinct tensors: the exporter merges inputs that share a tensor.
        for name in _cache_names(model, kind, "past_key_values"):
            inputs[name] = (torch.randn(sizes.batch, heads, number, width), dims)
    outputs = ["logits", *_cache_names(model, "decoder", "present")]
    what = "One step of the decoder: scores of the next token, behind those whose keys and values are given."
    return Graph(what, _decode, inputs, outputs)


# The graphs of each task


def _vision_encoder(model, sizes: Sizes) -> Graph:
    return Graph("Images: their tokens' states.", _encode_images, _images(model, sizes), ["image_states"])


def _question_answering(model, sizes: Sizes) -> dict[str, Graph]:
    return {
        "vision_encoder": _vision_encoder(model, sizes),
        "question_encoder": Graph(
            "Questions about images: what the decoder reads, a mask and the keys and values of its cross-attention.",
            _encode_questions,
            {**_texts(model, sizes), **_states(model, sizes, "image_states")},
            ["encoder_attention_mask", *_cache_names(model, "encoder", "present")],
        ),
        "decoder": _decoder(model, sizes, 4 + 5 * sizes.batch, varies=True),
    }


def _captioning(model, sizes: Sizes) -> dict[str, Graph]:
    num_states = _states(model, sizes, "states")["states"][0].shape[1]
    return {
        "vision_encoder": Graph(
            "Images: what the decoder reads, a mask and the keys and values of its cross-attention.",
            _encode_images_for_decoder,
            _images(model, sizes),
            ["encoder_attention_mask", *_cache_names(model, "encoder", "present")],
        ),
        "decoder": _decoder(model, sizes, num_states, varies=False),
    }


def _visual_reasoning(model, sizes: Sizes) -> dict[str, Graph]:
    return {
        "vision_encoder": _vision_encoder(model, sizes),
        "classifier": Graph(
            "Sentences about pairs of images: scores of false and true.",
            _classify_pairs,
            {**_texts(model, sizes), **_states(model, sizes, "left_states", "right_states")},
            ["logits"],
        ),
    }


def _retrieval(model, sizes: Sizes) -> dict[str, Graph]:
    texts = _texts(model, sizes)
    return {
        "vision_encoder": Graph(
            "Images: their tokens' states, for the matching head, and their normalised features.",
            _encode_images_with_feature,
            _images(model, sizes),
            ["image_states", "image_feature"],
        ),
        "text_encoder": Graph("Texts: their normalised features.", _encode_texts, texts, ["text_feature"]),
        "matching_head": Graph(
            "Texts with an image each: scores of no match and match.",
            _match,
            {**texts, **_states(model, sizes, "image_states")},
            ["itm_score"],
        ),
    }


def _clip(model, sizes: Sizes) -> dict[str, Graph]:
    images, texts = _images(model, sizes), _texts(model, sizes)
    return {
        "vision_encoder": Graph("Images: their normalised features.", _encode_clip_images, images, ["image_feature"]),
        "text_encoder": Graph("Texts: their normalised features.", _encode_clip_texts, texts, ["text_feature"]),
    }


_GRAPHS = {
    "vqa": _question_answering,
    "captioning": _captioning,
    "nlvr2": _visual_reasoning,
    "retrieval": _retrieval,
    "clip": _clip,
}


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
                " it can't be"
                f" used, and nothing was written; try another version of torch than {torch.__version__}, or of"
                " onnxscript."
            )


def _check(model) -> None:
    """Raise an error for a model that can't be exported."""
    if getattr(model, "task", None) not in _GRAPHS:
        raise TypeError(f"export_onnx got a {type(model).__name__}: expected one of madtp_hf's models.")
    if model.is_pruning and model.config.pruning_granularity != "frozen":
        raise ValueError(
            "This model leaves a number of tokens that depends on its input, which no graph can: freeze it with"
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
    counts = config.token_counts() if model.is_pruning else None
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
    if model.task == "clip":
        description["logit_scale"] = model.logit_scale.exp().item()
    return description


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
        raise ValueError(f"{out} exists and is not an empty folder: choose another, or replace it with force.")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written beside `out`, so that renaming puts it in place in one step.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        with _as_traced(model):
            make = _GRAPHS[model.task]
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
