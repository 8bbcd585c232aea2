"""Which version of madtp_hf this code is, and with which versions of transformers it was tested.

It travels with every checkpoint: years later, with another transformers around it, the code says at once what it was
made for.
"""

import re

import transformers
from transformers.utils import logging


VERSION = "0.2.0"
# The oldest and the newest that `make test-matrix` has passed with.
TESTED_TRANSFORMERS = ("5.0.0", "5.24.0")

# Below transformers' own, so that its verbosity, and TRANSFORMERS_VERBOSITY, count.
logger = logging.get_logger("transformers.models.madtp_blip")


def _release(version: str) -> tuple[int, ...]:
    """Return major and minor version: patch releases of a tested version need no warning."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def warn_if_untested() -> None:
    """Warn, once a process, of a transformers outside the tested range."""
    installed, (oldest, newest) = transformers.__version__, TESTED_TRANSFORMERS
    if _release(installed) < _release(oldest):
        logger.warning_once(
            f"The code of madtp_hf {VERSION} needs transformers {oldest} or newer and this is {installed}: install"
            f' "transformers>={oldest},<={newest}".'
        )
    elif _release(installed) > _release(newest):
        logger.warning_once(
            f"The code of madtp_hf {VERSION} was tested with transformers up to {newest} and this is {installed}: if"
            " something breaks, install"
            f' "transformers<={newest}", or take a newer version of this code, with the checkpoint or as madtp_hf.'
        )
