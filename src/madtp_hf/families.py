"""The model families, each in one record. To add a family, add a record, and name it in its tasks.

How a dense model becomes one of ours is `from_dense` of the family's model classes, publicly named `from_blip` and
`from_clip`.
"""

from dataclasses import dataclass

from transformers import BlipConfig, BlipProcessor, CLIPConfig, CLIPProcessor, PretrainedConfig, ProcessorMixin

from .modeling.configuration_madtp_blip import MadtpBlipConfig
from .modeling.configuration_madtp_clip import MadtpClipConfig


@dataclass(frozen=True)
class Family:
    """What all tasks of a model family share."""

    name: str
    config_class: type[PretrainedConfig]
    dense_config_class: type[PretrainedConfig]  # transformers'
    processor_class: type[ProcessorMixin]
    tokenizer: str  # the Hub id of the tokenizer that original checkpoints were trained with


BLIP = Family("BLIP", MadtpBlipConfig, BlipConfig, BlipProcessor, "bert-base-uncased")
CLIP = Family("CLIP", MadtpClipConfig, CLIPConfig, CLIPProcessor, "openai/clip-vit-base-patch32")
