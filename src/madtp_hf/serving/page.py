"""A web page that shows what a pruned model drops: ask a question or caption an image, and move the reduction.

`examples/app.py` runs it locally; a Space that [`push_space`] publishes runs it on the Hub.
"""

import html
import os
import statistics
import threading
import time
from typing import NamedTuple

import torch

from ..budgets.evaluation import record_branches, synchronize
from ..budgets.flops import count_flops, dense_flops
from ..budgets.passes import restored
from ..modeling.images import read_image
from .endpoint_handler import FORMATS, Limits
from .visualization import Survivors, collect_survivors, draw_patches, preprocess, words_as_html


TASKS_SHOWN = {"vqa": 10, "captioning": 50}  # and the maximum number of tokens to generate
# Each click is timed at least three times after a warm-up, and until one of the limits.
LEAST_ROUNDS, TIMED_SECONDS, TIMED_ROUNDS = 3, 1.0, 15
DRAWN_LAYERS = 6
# Small images are enlarged without smoothing; buttons don't cover the drawing.
_STYLE = """<style>
#image img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated }
#patches .icon-button-wrapper { display: none }
</style>"""
_TILE = (
    '<div style="flex: 1; border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 8px 12px">'
    '<div style="font-size: 0.8em; opacity: 0.7">{name}</div>'
    '<div style="font-size: 1.35em; font-weight: 600">{value}</div>'
    '<div style="font-size: 0.8em; opacity: 0.7">{dense}</div></div>'
)


class TimedAnswer(NamedTuple):
    """A model's text, the GFLOPs of the pass, generated tokens included, and the seconds of `generate`, warm."""

    text: str
    gflops: float
    seconds: float


class Look(NamedTuple):
    """The result of one click: the run of the pruned model, that of the dense one, and the tokens that survive."""

    pruned: TimedAnswer
    dense: TimedAnswer
    survivors: Survivors


def check_shown(task: str | None, config, source) -> None:
    """Raise a `ValueError` for a model that the page can't show: of another task, or without a schedule."""
    if task not in TASKS_SHOWN:
        raise ValueError(f"{source} is a model for {task}: expected one for {' or '.join(TASKS_SHOWN)}.")
    if not config.pruning_schedule:
        raise ValueError(
            f"{source} has no calibrated schedule, which sets the slider's range: run"
            " `madtp_hf.calibrate(model, dataloader, reductions)` and save it again."
        )


def _time_in_turns(model, write, reductions: list[float]) -> list[float]:
    """Return the median seconds of `write` at each reduction; they take turns, after a warm-up run each."""
    seconds: list[list[float]] = [[] for _ in reductions]
    begun = time.perf_counter()
    for number in range(TIMED_ROUNDS + 1):
        for index, reduction in enumerate(reductions):
            model.set_pruning(reduction=reduction)
            synchronize(model.device)
            start = time.perf_counter()
            write()
            synchronize(model.device)
            seconds[index].append(time.perf_counter() - start)
        if number >= LEAST_ROUNDS and time.perf_counter() - begun > TIMED_SECONDS:
            break
    return [statistics.median(times[1:]) for times in seconds]


@torch.no_grad()
def look(model, processor, image, text: str, reduction: float) -> Look:
    """Run a model on an image, pruned at a reduction and dense, and find the tokens that survive.

    Args:
        model, processor: A calibrated model of `TASKS_SHOWN` and its processor; the model's temperature is restored
            afterwards.
        image: A PIL image, an array or a path.
        text (`str`): The question; captioning ignores it.
        reduction (`float`): The share of FLOPs to save, within the model's schedule.

    Raises:
        ValueError: for a reduction that the schedule doesn't cover, or a question that is empty or too long.
    """
    if model.task == "vqa" and not text.strip():
        raise ValueError("The question is empty: expected some words.")
    batch, pictures = preprocess(model, processor, [image], [text])
    inputs = batch if model.task == "vqa" else {"pixel_values": batch["pixel_values"]}

    longest = min(TASKS_SHOWN[model.task], model.config.text_config.max_position_embeddings - 2)

    def write():
        return model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=longest)

    runs = []
    with restored(model):
        times = _time_in_turns(model, write, [0.0, reduction])
        for share, seconds in zip((0.0, reduction), times):
            model.set_pruning(reduction=share)
            with record_branches(model, positions=True) as outputs:
                written = write()
            vision, words = outputs["vision"].num_tokens, outputs.get("text")
            words = None if words is None else words.num_tokens
            count = count_flops if share else dense_flops
            flops = count(model.config, model.task, vision, words, written.shape[1] - 1)  # the last one isn't read
            answer = processor.tokenizer.decode(written[0], skip_special_tokens=True).strip()
            runs.append(TimedAnswer(answer, flops.item() / 1e9, seconds))
    (survivors,) = collect_survivors(model, processor, batch, pictures, outputs)
    return Look(runs[1], runs[0], survivors)


def cost_html(found: Look) -> str:
    """Format the answer and its cost, next to the dense model's, as HTML."""
    pruned, dense = found.pruned, found.dense
    same = "the same" if pruned.text == dense.text else f"“{html.escape(dense.text)}”"
    saved, faster = 1 - pruned.gflops / dense.gflops, dense.seconds / pruned.seconds
    note = "Slower here: the bookkeeping of pruning costs more than it saves, as in small models."
    times = [f"{s * 1000:.1f} ms" if s < 1 else f"{s:.2f} s" for s in (pruned.seconds, dense.seconds)]
    tiles = [
        ("GFLOPs", f"{pruned.gflops:.3g}", f"dense {dense.gflops:.3g}: {saved:.0%} saved"),
        ("Time", times[0], f"dense {times[1]}: {faster:.2f} times faster"),
    ]
    return (
        f'<div style="font-size: 1.8em; font-weight: 600">{html.escape(pruned.text) or "(nothing)"}</div>'
        f'<div style="opacity: 0.7; margin-bottom: 10px">Dense, it answers: {same}</div>'
        '<div style="display: flex; gap: 10px">'
        + "".join(_TILE.format(name=name, value=value, dense=cost) for name, value, cost in tiles)
        + f'</div><div style="font-size: 0.8em; opacity: 0.7; margin-top: 6px">{note if faster < 1 else ""}</div>'
    )


def layers_to_draw(num_layers: int, number: int = DRAWN_LAYERS) -> list[int]:
    """Choose at most `number` layers, the first and the last included, denser at the start, where most tokens go."""
    number = min(number, num_layers)
    if number == 1:
        return [num_layers]
    return sorted({max(index + 1, round(num_layers ** (index / (number - 1)))) for index in range(number)})


def plot_tokens(survivors: Survivors):
    """Plot how many tokens enter each encoder and leave each layer, as a small bar chart: a `matplotlib` figure."""
    from matplotlib.figure import Figure

    branches = [("image tokens", survivors.counts[0].tolist(), "#2563eb")]
    if survivors.words is not None:
        branches.append(("text tokens", survivors.words.counts.tolist(), "#d97706"))
    figure = Figure(figsize=(7, 2.1), dpi=110, layout="constrained")
    widths = [len(counts) + 2 for _, counts, _ in branches]
    all_axes = figure.subplots(1, len(branches), squeeze=False, width_ratios=widths)[0]
    for axes, (name, counts, color) in zip(all_axes, branches):
        bars = axes.bar(range(len(counts)), counts, color=["#cbd5e1", *[color] * (len(counts) - 1)])
        axes.bar_label(bars, fontsize=8)
        axes.set_xticks(range(len(counts)), ["in", *map(str, range(1, len(counts)))], fontsize=8)
        axes.set_yticks([])
        axes.set_title(name, fontsize=9, loc="left")
        axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def make_app(model, processor, examples=(), name: str | None = None):
    """Build the page, a `gradio.Blocks`; call its `launch()`.

    What visitors give has the limits of an endpoint, and the same environment variables set them.

    Args:
        model, processor: As [`look`] takes them.
        examples (`list`, *optional*): Pairs of an image (a path or a PIL image) and a question (for captioning, any
            string) to offer.
        name (`str`, *optional*): The model's name on the page.

    Raises:
        ImportError: without gradio or matplotlib.
        ValueError: for a model of another task, or one without a calibrated schedule.
    """
    try:
        import gradio as gr
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("The app needs gradio and matplotlib: pip install 'madtp_hf[app]'.") from error
    name = name or model.config._name_or_path or type(model).__name__
    check_shown(model.task, model.config, name)
    asks, reductions = model.task == "vqa", model.config.calibrated_reductions
    least, most = reductions[0], reductions[-1]
    layers = layers_to_draw(model.config.vision_config.num_hidden_layers)
    limits = Limits.from_environment()
    lock = threading.Lock()  # all users share the model's temperature

    def show(image, question, reduction):
        if image is None:
            raise gr.Error("There is no image: choose an example or upload one.")
        try:
            question = limits.check_text("The question", question or "")
            if isinstance(image, (str, os.PathLike)):  # an upload
                limits.check(
                    "max_image_bytes", os.path.getsize(image), f"The image has {os.path.getsize(image):,} bytes"
                )
            image = read_image(image, limits.max_pixels, formats=FORMATS)
            with lock:
                found = look(model, processor, image, question, reduction)
        except ValueError as error:
            raise gr.Error(str(error)) from error
        words = "" if found.survivors.words is None else words_as_html(found.survivors.words, None)
        patches = draw_patches([found.survivors], None, layers, size=140)
        return cost_html(found), words, plot_tokens(found.survivors), patches

    first = examples[0] if examples else (None, "")
    with gr.Blocks(title="What a pruned model drops", analytics_enabled=False) as app:
        gr.Markdown(
            f"## What a pruned model drops\n`{name}` reads an image as patches"
            + (" and a question as words," if asks else ",")
            + " and drops, layer by layer, those that don't matter. Move the reduction and see what stays."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = gr.Image(
                    first[0],
                    type="filepath",  # gradio would decode the other types whatever their size
                    image_mode=None,
                    label="Image",
                    height=250,
                    elem_id="image",
                )
                question = gr.Textbox(first[1], label="Question", visible=asks, elem_id="question", max_lines=2)
                reduction = gr.Slider(
                    least,
                    max(most, least + 0.01),
                    reductions[len(reductions) // 2],
                    step=0.01,
                    interactive=most > least,
                    label="Reduction: the share of FLOPs to save",
                    elem_id="reduction",
                )
                button = gr.Button("Ask" if asks else "Caption", variant="primary", elem_id="run")
            with gr.Column(scale=3, min_width=420):
                answer = gr.HTML(elem_id="answer", padding=False)
                gr.Markdown("#### Words that stay", visible=asks)
                words = gr.HTML(visible=asks, elem_id="words", padding=False)
                gr.Markdown("#### Tokens that each layer leaves")
                tokens = gr.Plot(show_label=False, elem_id="tokens")
        gr.Markdown("#### Patches that stay")
        patches = gr.Image(show_label=False, interactive=False, format="png", elem_id="patches", container=False)
        inputs, outputs = [image, question, reduction], [answer, words, tokens, patches]
        if examples:
            rows = [list(example) if asks else [example[0]] for example in examples]
            shown = gr.Examples(rows, [image, question] if asks else [image], cache_examples=False)
            shown.load_input_event.then(show, inputs, outputs)
            app.load(show, inputs, outputs)
        gr.HTML(_STYLE, padding=False)
        button.click(show, inputs, outputs)
        question.submit(show, inputs, outputs)
        # While the slider is dragged, only its last position counts.
        reduction.change(show, inputs, outputs, trigger_mode="always_last", show_progress="hidden")
    return app


def digit_examples(number: int = 6) -> list[tuple]:
    """Return pairs of a digit scene from the test split and a question about it, for the models of the examples.

    Raises:
        ImportError: without scikit-learn and datasets.
    """
    from ..data import load_digit_questions

    return [(row["image"], row["question"]) for row in load_digit_questions("test", number, seed=1)]
