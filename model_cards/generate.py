"""Write the cards of the shipped checkpoints, examples/*/README.md: hand-written notes from here, figures from
where they were measured.

python model_cards/generate.py           # write them
python model_cards/generate.py --check   # exit 1 if a committed card is not what this script would write
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import ModelCard

from madtp_hf.checkpoints.card import write_model_card
from madtp_hf.tasks import TASKS


HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
# By folder, the task.
CHECKPOINTS = {
    "blip-vqa-digits": "vqa",
    "blip-vqa-digits-plain": "vqa",
    "blip-nlvr2-digits": "nlvr2",
    "blip-captioning-digits": "captioning",
    "blip-retrieval-digits": "retrieval",
    "clip-digits": "clip",
    "blip-vqa-garments": "vqa",
    "clip-garments": "clip",
}
# An example of a text for each task on digit scenes; of captioning, the prompt.
TEXTS = {
    "vqa": "how many sevens are there?",
    "nlvr2": "the left image has more sevens than the right",
    "captioning": "a picture of",
    "retrieval": "digits from the left: red seven green three",
    "clip": "digits from the left: red seven green three",
}


def question_answering_metrics(name: str) -> dict:
    """What the training script measured at its end."""
    last = json.loads((EXAMPLES / name / "train.log").read_text().splitlines()[-1])
    return {
        "title": "10,000 questions about scans that were never seen in training",
        "results": [{"accuracy %": last["accuracy"]}],
        "source": "the last line of [`train.log`](train.log)",
    }


def demo_metrics(task: str) -> dict:
    """What `make demo-all` measured of the dense checkpoint, before it trained and pruned it."""
    path = HERE.parent / "benchmarks" / "results" / "demo_all_digits.json"
    outcome = json.loads(path.read_text())["tasks"][task]
    return {
        "title": outcome["title"],
        "results": [outcome["dense_before_training"]],
        "baseline": outcome["baseline"],
        "metric": TASKS[task].headline,
        "source": f"`make demo-all`, before its training; [`{path.name}`](../../benchmarks/results/{path.name})",
    }


def clip_metrics() -> dict:
    """What `benchmarks/clip_digits.py` measured of the dense checkpoint."""
    path = HERE.parent / "benchmarks" / "results" / "clip_digits.json"
    dense = next(row for row in json.loads(path.read_text())["rows"] if row["kind"] == "dense")
    return {
        "title": dense["title"],
        "results": [dense["recalls"]],
        "baseline": dense["baseline"],
        "metric": TASKS["clip"].headline,
        "source": f"`python benchmarks/clip_digits.py`; [`{path.name}`](../../benchmarks/results/{path.name})",
    }


def garment_metrics(task: str) -> dict:
    """What `benchmarks/selection.py --photographs` measured of the dense checkpoint."""
    path = HERE.parent / "benchmarks" / "results" / f"selection_photographs{'_clip' * (task == 'clip')}.json"
    content = json.loads(path.read_text())
    dense = next(row for row in content["rows"] if row["method"] == "dense")
    samples = content["settings"]["test_samples"]
    return {
        "title": f"{samples} photographs, which of ten captions"
        if task == "clip"
        else f"{samples} questions about photographs",
        "results": [{"accuracy %": dense["points"][0]["score"]}],
        "metric": "accuracy %",
        "source": f"`python benchmarks/selection.py`; [`{path.name}`](../../benchmarks/results/{path.name})",
        "dataset": {
            "name": "clothing-dataset-small",
            "split": "test",
            "example": "a photo of a dress" if task == "clip" else "what garment is this?",
        },
    }


def metrics_of(name: str) -> dict:
    """What was measured of the checkpoint of that name."""
    task = CHECKPOINTS[name]
    if name.endswith("-garments"):
        return garment_metrics(task)
    if task == "clip":
        return clip_metrics()
    return question_answering_metrics(name) if task == "vqa" else demo_metrics(task)


def write_card(name: str, folder: Path) -> None:
    """Write the card of the checkpoint of that name to the folder, which has its config.json."""
    task, metrics = CHECKPOINTS[name], metrics_of(name)
    metrics.setdefault("dataset", {"name": "digit scenes", "split": "test", "example": TEXTS[task]})
    write_model_card(
        folder,
        f"examples/{name}",  # loads from the root of this repository
        metrics,
        license="apache-2.0",
        notes=(HERE / f"{name}.md").read_text(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a card is not current")
    args = parser.parse_args()
    stale = []
    for name in CHECKPOINTS:
        folder = EXAMPLES / name
        if not args.check:
            write_card(name, folder)
            continue
        with TemporaryDirectory() as scratch:
            Path(scratch, "config.json").write_text((folder / "config.json").read_text())
            write_card(name, Path(scratch))
            # The order of the metadata is huggingface_hub's, and another of its versions may have another.
            current, committed = (ModelCard.load(place / "README.md") for place in (Path(scratch), folder))
            if (current.data.to_dict(), current.text) != (committed.data.to_dict(), committed.text):
                stale.append(f"examples/{folder.name}/README.md")
    if stale:
        sys.exit(f"Not current: {', '.join(stale)}. Run `make cards`, and commit what it writes.")


if __name__ == "__main__":
    main()
