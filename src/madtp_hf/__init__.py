"""BLIP made faster: MADTP token pruning, in the manner of transformers."""

from .calibration import calibrate
from .conversion import convert_original_checkpoint
from .flops import count_flops
from .modeling.configuration_madtp_blip import MadtpBlipConfig
from .modeling.modeling_madtp_blip import (
    MadtpBlipForConditionalGeneration,
    MadtpBlipForImagesAndTextClassification,
    MadtpBlipForImageTextRetrieval,
    MadtpBlipForQuestionAnswering,
)
from .training.reduction_callback import ReductionCallback
from .version import __version__


__all__ = [
    "MadtpBlipConfig",
    "MadtpBlipForConditionalGeneration",
    "MadtpBlipForImageTextRetrieval",
    "MadtpBlipForImagesAndTextClassification",
    "MadtpBlipForQuestionAnswering",
    "ReductionCallback",
    "__version__",
    "calibrate",
    "convert_original_checkpoint",
    "count_flops",
]
