"""Which checkpoint of an interrupted training to go on from."""

import json
from pathlib import Path


def last_checkpoint(output_dir) -> str | None:
    """Return the newest complete checkpoint in a `Trainer`'s output folder, for
    `trainer.train(resume_from_checkpoint=...)`, or None.

    `resume_from_checkpoint=True` takes the newest folder, complete or not, and fails on one that was being written
    when the process was killed. `Trainer` writes `trainer_state.json` last; a folder without a whole one is passed
    over here.
    """
    folders = [
        path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()
    ]
    for folder in sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):  # not there, or cut short
            continue
        return str(folder)
    return None
