"""Write tests/fixtures/checkpoint-v<version>: a tiny checkpoint saved by this version, with its code and outputs.

Run it once per release, from the repository's root, and commit the result:

    python -m tests.helpers.make_frozen_checkpoint

It only creates the folder of a new version. Existing folders keep their own code and weights permanently:
`checkpoint-v<version>.sha256` beside each folder has the hash of each file, and a test compares them. Later versions
must load them.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from madtp_hf import MadtpBlipForQuestionAnswering, __version__, calibrate

from ..conftest import make_blip, make_inputs, make_processor
from . import check_checkpoint


FIXTURES = Path(__file__).parents[1] / "fixtures"


def hashes(folder: Path) -> str:
    """Return one line per file, as `sha256sum *` prints it in the folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)


def write(folder: Path) -> None:
    """Write the checkpoint, its outputs and, beside the folder, its hashes."""
    folder.mkdir(parents=True)
    small = {"hidden_size": 16, "intermediate_size": 32}
    blip = make_blip(text_config={**small, "num_hidden_layers": 2}, vision_config=small)
    model = MadtpBlipForQuestionAnswering.from_blip(blip, num_alignment_tokens=12)
    batches = [make_inputs((9, 5, 7, 12), seed=seed) for seed in range(1, 4)]
    calibrate(model, batches, [0.2, 0.3, 0.4])
    model.set_pruning(reduction=0.3)
    processor = make_processor()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)

    inputs = make_inputs((9, 5, 7))
    save_file(inputs, folder / check_checkpoint.INPUTS)
    outputs = {
        f"{name}.{key}": tensor.contiguous()
        for name, function in check_checkpoint.RECORDED.items()
        for key, tensor in function(model, inputs).items()
    }
    save_file(outputs, folder / check_checkpoint.OUTPUTS)
    answers = check_checkpoint.ask(model.as_pipeline(processor))
    (folder / check_checkpoint.ANSWER).write_text(json.dumps(answers, indent=2) + "\n")
    folder.with_name(f"{folder.name}.sha256").write_text(hashes(folder))


def main(fixtures: Path = FIXTURES) -> None:
    folder = fixtures / f"checkpoint-v{__version__}"
    if folder.exists():
        sys.exit(
            f"{folder} is there already, and a frozen checkpoint stays as it is. Expected a version that has none: "
            f"raise VERSION, now {__version__}, in src/madtp_hf/modeling/versions.py first."
        )
    write(folder)
    print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()) / 1000:.0f} kB")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
