"""Writes tests/fixtures/checkpoint-v<version>: a tiny checkpoint as this version saves it, and what it answers. Later versions are held against it.

Run it once a release, from the repository's root, and commit what it writes: python -m tests.make_frozen_checkpoint
What is there already is never written over: delete an unreleased version's folder first.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from madtp_hf import MadtpBlipForQuestionAnswering, __version__, calibrate

from . import check_checkpoint
from .conftest import make_blip, make_inputs, make_processor


FOLDER = Path(__file__).parent / "fixtures" / f"checkpoint-v{__version__}"


def main():
    FOLDER.mkdir(parents=True)  # an error if it is there
    small = {"hidden_size": 16, "intermediate_size": 32}
    blip = make_blip(text_config={**small, "num_hidden_layers": 2}, vision_config=small)
    model = MadtpBlipForQuestionAnswering.from_blip(blip, num_alignment_tokens=12)
    batches = [make_inputs((9, 5, 7, 12), seed=seed) for seed in range(1, 4)]
    calibrate(model, batches, [0.2, 0.3, 0.4])
    model.set_pruning(reduction=0.3)
    processor = make_processor()
    model.save_pretrained(FOLDER)
    processor.save_pretrained(FOLDER)

    inputs = make_inputs((9, 5, 7))
    save_file(inputs, FOLDER / check_checkpoint.INPUTS)
    outputs = {
        f"{name}.{key}": tensor.contiguous()
        for name, function in check_checkpoint.RECORDED.items()
        for key, tensor in function(model, inputs).items()
    }
    save_file(outputs, FOLDER / check_checkpoint.OUTPUTS)
    answers = check_checkpoint.ask(model.as_pipeline(processor))
    (FOLDER / check_checkpoint.ANSWER).write_text(json.dumps(answers, indent=2) + "\n")
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    print(f"{FOLDER}: {size / 1000:.0f} kB")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
