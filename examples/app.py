"""Show in a browser what a pruned model drops: ask questions and move the reduction.

Without a checkpoint, the script prunes one of the tiny dense models in this folder, on digit scenes and without
training, which takes some seconds.

    python examples/app.py
    python examples/app.py outputs/demo/checkpoint
"""

import argparse
import os
from pathlib import Path

from torch.utils.data import DataLoader
from transformers import AutoProcessor, set_seed

from madtp_hf import calibrate, init_alignment_from
from madtp_hf.checkpoints.load import load
from madtp_hf.data import load_digit_captions, load_digit_questions
from madtp_hf.serving.endpoint_handler import Limits
from madtp_hf.serving.page import TASKS_SHOWN, digit_examples, make_app
from madtp_hf.tasks import TASKS


HERE = Path(__file__).parent


def prune_digit_model(task: str, num_samples: int = 256, seed: int = 1):
    """Prune the dense digit model of a task without training; return the model and its processor."""
    set_seed(seed)
    source, load = HERE / f"blip-{task}-digits", load_digit_questions if task == "vqa" else load_digit_captions
    processor = AutoProcessor.from_pretrained(source)
    model = TASKS[task].model_class.from_blip(source).eval()
    collator = TASKS[task].collator(processor, model.config.text_config.bos_token_id)
    if TASKS[task].text_encoder:  # captioning has no text encoder and starts with random alignment tokens
        init_alignment_from(model, DataLoader(load("train", num_samples, seed), batch_size=64, collate_fn=collator))
    batches = list(DataLoader(load("validation", num_samples, seed), batch_size=64, collate_fn=collator))
    calibrate(model, batches, [0.3, 0.5, 0.7, 0.8])
    return model, processor


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="A pruned checkpoint: a folder or Hub id.")
    parser.add_argument(
        "--task", choices=list(TASKS_SHOWN), default="vqa", help="The digit model to prune if MODEL is not given."
    )
    parser.add_argument("--port", type=int, help="Default: the first free port from 7860.")
    args = parser.parse_args()
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
    if args.model is None:
        model, processor = prune_digit_model(args.task)
        name = f"blip-{args.task}-digits"
    else:
        loaded = load(args.model, tuple(TASKS_SHOWN), precision="auto")
        model, processor = loaded.model, loaded.processor
        name = args.model
    app = make_app(model, processor, digit_examples(), name)
    app.launch(server_port=args.port, max_file_size=Limits.from_environment().max_image_bytes)


if __name__ == "__main__":
    main()
