"""The version of this code, and the versions of transformers that it was tested with.

This file is part of every checkpoint, so that the code can warn if it is loaded years later with another transformers.
"""

import re

import transformers
from transformers.utils import logging


VERSION = "0.3.0"
# The oldest and the newest version that `make test-matrix` passed with.
TESTED_TRANSFORMERS = ("5.0.0", "5.24.0")

# A child of transformers' logger, so that its verbosity and TRANSFORMERS_VERBOSITY apply.
logger = logging.get_logger("transformers.models.madtp_blip")


def _release(version: str) -> tuple[int, ...]:
    """Return the major and minor version; patch releases of a tested version need no warning."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def warn_if_untested() -> None:
    """Warn once per process if the installed transformers is outside the tested range."""
    installed, (oldest, newest) = transformers.__version__, TESTED_TRANSFORMERS
    if _release(installed) < _release(oldest):
        logger.warning_once(
            f"The code of madtp_hf {VERSION} needs transformers {oldest} or newer and this is {installed}: install"
            f' "transformers>={oldest},<={newest}".'
        )
    elif _release(installed) > _release(newest):
        logger.warning_once(
            f"The code of madtp_hf {VERSION} was tested with transformers up to {newest} and this is {installed}: if"
            f' something breaks, install "transformers<={newest}", or a newer madtp_hf or checkpoint.'
        )
