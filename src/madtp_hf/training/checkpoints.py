"""Find the checkpoint from which to resume an interrupted training."""

import json
import os
from pathlib import Path


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Return the newest complete checkpoint in a `Trainer`'s output folder, or None if there is none.

    Pass it to `trainer.train(resume_from_checkpoint=...)`. `resume_from_checkpoint=True` takes the newest folder,
    complete or not, and fails on one that was being written when the process was killed. `Trainer` writes
    `trainer_state.json` last; this function skips folders in which that file is missing or incomplete.
    """
    folders = [
        path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()
    ]
    for folder in sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):  # missing or incomplete
            continue
        return str(folder)
    return None
