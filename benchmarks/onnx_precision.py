"""Measure what ONNX graphs in float32 and int8 score on digit scenes, beside the model that they were made from.

    python benchmarks/onnx_precision.py

A row is a dense model of examples/: its score in torch, that of the model pruned with frozen token counts, and those
of its graphs as `madtp-hf export` writes them, run by the folder's runner. Alignment tokens are those of
`init_alignment_from`; they and the token counts come from the training and the validation split. Retrieval and CLIP
are scored by features, images against all of their captions.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from calibrating import calibrate_all
from digit_tasks import (
    LOADERS,
    MODELS,
    Evaluation,
    load_model,
    make_batches,
    make_collator,
    shipped_models,
)
from reporting import Rows, environment, make_parser, print_table, settings_of
from selection import init_from_training_data

from madtp_hf.serving.onnx_export import PRECISIONS, export_onnx
from madtp_hf.serving.onnx_runner import OnnxModel
from madtp_hf.tasks import TASKS


BATCH_SIZE = 50


def predict(graphs: OnnxModel, task: str, collator, rows: list[dict]) -> list:
    """Return what the graphs say of some rows of a data set, in the form that `Evaluation.score` takes."""
    if task == "vqa":
        return graphs([row["image"] for row in rows], [row["question"] for row in rows], max_new_tokens=3)
    if task == "nlvr2":
        pairs = [(row["left_image"], row["right_image"]) for row in rows]
        return (graphs(pairs, [row["sentence"] for row in rows]) > 0.5).astype(int).tolist()
    images = [row["image"] for row in rows]
    if task == "captioning":
        captions = graphs(images, collator.prompt, max_new_tokens=graphs.description["max_text_length"])
        return [caption.removeprefix(collator.prompt).strip() for caption in captions]
    captions = [caption for row in rows for caption in row["captions"]]
    features = graphs.run("vision_encoder", pixel_values=graphs.read_images(images))["image_feature"]
    texts = graphs.run("text_encoder", **graphs.read_texts(captions))["text_feature"]
    return list(zip(torch.from_numpy(features), torch.from_numpy(texts).unflatten(0, (len(rows), -1))))


def measure(task: str, folder: Path, args) -> dict:
    """Return a row: the scores of one model."""
    collator, model = make_collator(task, folder), load_model(task, folder)
    number = args.images if TASKS[task].embeds else args.samples
    test = LOADERS[task]("test", number)
    evaluation = Evaluation(task, test, collator)
    (dense,) = evaluation.at(model, [0.0])
    init_from_training_data(model, task, collator, seed=0)
    validation = make_batches(task, LOADERS[task]("validation", args.validation_samples), collator)
    calibrate_all(model, validation, [args.reduction], freeze=True)
    (pruned,) = evaluation.at(model, [args.reduction])
    row = {"task": task, "model": folder.name, "metric": TASKS[task].headline, "samples": number}
    row |= {"reached": pruned["reached"], "dense": dense["score"], "torch": pruned["score"]}
    model.set_pruning(reduction=args.reduction)
    starts = range(0, number, BATCH_SIZE)
    with TemporaryDirectory() as scratch:
        for precision in PRECISIONS:
            graphs = OnnxModel(export_onnx(model, collator.processor, Path(scratch, precision), precision=precision))
            batches = (list(test.select(range(start, min(start + BATCH_SIZE, number)))) for start in starts)
            predictions = [made for rows in batches for made in predict(graphs, task, collator, rows)]
            row[precision] = round(evaluation.score(predictions), 5)
    return row


def main(arguments=None):
    parser = make_parser(__doc__, "onnx_precision.json")
    parser.add_argument("--tasks", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--reduction", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=1000, help="of the test split; of retrieval and CLIP: --images")
    parser.add_argument("--images", type=int, default=250, help="of the test split, for retrieval and CLIP")
    parser.add_argument("--validation_samples", type=int, default=512, help="to calibrate on")
    args = parser.parse_args(arguments)
    header = {"settings": settings_of(args, "tasks"), **environment(packages=["onnxruntime"])}
    results = Rows(args.output, header, ("task", "model"))
    for task, folder in shipped_models(args.tasks):
        if (task, folder.name) not in results:
            results.add(measure(task, folder, args))
    columns = ["task", "model", "metric", "samples", "reached", "dense", "torch", *PRECISIONS]
    print_table("scores", columns, ([row[name] for name in columns] for row in results.rows.values()))


if __name__ == "__main__":
    main()
