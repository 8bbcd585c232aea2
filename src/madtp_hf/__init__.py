"""Faster BLIP and CLIP by MADTP token pruning, compatible with transformers."""

from .budgets.alignment import init_alignment_from
from .budgets.calibration import calibrate
from .budgets.flops import count_flops
from .checkpoints.convert import convert_original_checkpoint
from .checkpoints.push import push_checkpoint, push_folder
from .modeling.configuration_madtp_blip import MadtpBlipConfig
from .modeling.configuration_madtp_clip import MadtpClipConfig
from .modeling.modeling_madtp_blip import (
    MadtpBlipForConditionalGeneration,
    MadtpBlipForImagesAndTextClassification,
    MadtpBlipForImageTextRetrieval,
    MadtpBlipForQuestionAnswering,
)
from .modeling.modeling_madtp_clip import MadtpClipModel
from .modeling.versions import VERSION as __version__
from .training.checkpoints import last_checkpoint
from .training.optimizer import create_optimizer
from .training.reduction_callback import ReductionCallback
from .training.retrieval_trainer import RetrievalTrainer


def _register() -> None:
    """Register configurations and models with the Auto classes, so that users need no `trust_remote_code`."""
    import transformers
    from transformers import AutoConfig, AutoModel

    AutoConfig.register(MadtpBlipConfig.model_type, MadtpBlipConfig, exist_ok=True)
    # `AutoModel` takes one class per configuration; `from_pretrained` redirects to the class that a checkpoint names.
    AutoModel.register(MadtpBlipConfig, MadtpBlipForQuestionAnswering, exist_ok=True)
    for model in (MadtpBlipForQuestionAnswering, MadtpBlipForConditionalGeneration):
        getattr(transformers, model._task_auto_class).register(MadtpBlipConfig, model, exist_ok=True)
    AutoConfig.register(MadtpClipConfig.model_type, MadtpClipConfig, exist_ok=True)
    for auto_class in (AutoModel, getattr(transformers, MadtpClipModel._task_auto_class)):
        auto_class.register(MadtpClipConfig, MadtpClipModel, exist_ok=True)


_register()

__all__ = [
    "MadtpBlipConfig",
    "MadtpBlipForConditionalGeneration",
    "MadtpBlipForImageTextRetrieval",
    "MadtpBlipForImagesAndTextClassification",
    "MadtpBlipForQuestionAnswering",
    "MadtpClipConfig",
    "MadtpClipModel",
    "ReductionCallback",
    "RetrievalTrainer",
    "__version__",
    "calibrate",
    "convert_original_checkpoint",
    "count_flops",
    "create_optimizer",
    "init_alignment_from",
    "last_checkpoint",
    "push_checkpoint",
    "push_folder",
]
