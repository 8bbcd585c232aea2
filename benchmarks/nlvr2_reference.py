"""A dense NLVR2 BLIP as a timing reference, built from transformers' own parts with eager attention.

transformers has no such model. Parameters are named as in `MadtpBlipForImagesAndTextClassification`, and load from its
state dictionary.
"""

import copy

import torch
from torch import nn
from transformers import BlipVisionModel
from transformers.models.blip.modeling_blip_text import (
    BlipTextAttention,
    BlipTextEmbeddings,
    BlipTextIntermediate,
    BlipTextOutput,
    BlipTextSelfAttention,
)
from transformers.utils import ModelOutput

from madtp_hf.modeling.madtp_blip_encoders import MERGE_FROM_LAYER


class PairOutput(nn.Module):
    def __init__(self, config, merges: bool):
        super().__init__()
        width = config.hidden_size
        self.dense0, self.dense1 = nn.Linear(width, width), nn.Linear(width, width)
        self.merge_layer = nn.Linear(2 * width, width) if merges else None
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, left, right, hidden_states):
        left, right = self.dense0(left), self.dense1(right)
        seen = (left + right) / 2 if self.merge_layer is None else self.merge_layer(torch.cat([left, right], dim=-1))
        return self.LayerNorm(seen + hidden_states)


class PairAttention(nn.Module):
    def __init__(self, config, merges: bool):
        super().__init__()
        self.self0 = BlipTextSelfAttention(config, is_cross_attention=True)
        self.self1 = BlipTextSelfAttention(config, is_cross_attention=True)
        self.output = PairOutput(config, merges)

    def forward(self, hidden_states, left, right):
        left, _ = self.self0(hidden_states, encoder_hidden_states=left)
        right, _ = self.self1(hidden_states, encoder_hidden_states=right)
        return self.output(left, right, hidden_states)


class PairTextLayer(nn.Module):
    def __init__(self, config, index: int):
        super().__init__()
        self.attention = BlipTextAttention(config)
        self.crossattention = PairAttention(config, merges=index >= MERGE_FROM_LAYER)
        self.intermediate = BlipTextIntermediate(config)
        self.output = BlipTextOutput(config)

    def forward(self, hidden_states, mask, left, right):
        hidden_states, _ = self.attention(hidden_states, attention_mask=mask)
        hidden_states = self.crossattention(hidden_states, left, right)
        return self.output(self.intermediate(hidden_states), hidden_states)


class BlipForImagesAndText(nn.Module):
    """Classify input_ids, attention_mask (B, L) and pixel_values (B, 2, 3, H, W) -> logits (B, 2)."""

    def __init__(self, config):
        super().__init__()
        text, width = config.text_config, config.text_config.hidden_size
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = nn.Module()
        self.text_encoder.embeddings = BlipTextEmbeddings(text)
        self.text_encoder.encoder = nn.Module()
        layers = [PairTextLayer(text, index) for index in range(text.num_hidden_layers)]
        self.text_encoder.encoder.layer = nn.ModuleList(layers)
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    @classmethod
    def from_madtp(cls, model) -> "BlipForImagesAndText":
        """Build the dense counterpart of a `MadtpBlipForImagesAndTextClassification`, with its weights."""
        # Copied because transformers' parts write their attention implementation, eager, into the configuration.
        twin = cls(copy.deepcopy(model.config)).to(device=model.device, dtype=model.dtype)
        weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("alignment.")}
        twin.load_state_dict(weights)
        return twin.train(model.training)

    def forward(self, input_ids, pixel_values, attention_mask) -> ModelOutput:
        images = self.vision_model(pixel_values.flatten(0, 1)).last_hidden_state
        left, right = images.unflatten(0, (-1, 2)).unbind(1)
        states = self.text_encoder.embeddings(input_ids)
        # The mask that transformers' eager attention adds to the scores.
        mask = (attention_mask == 0)[:, None, None, :].to(states.dtype) * torch.finfo(states.dtype).min
        for layer in self.text_encoder.encoder.layer:
            states = layer(states, mask, left, right)
        return ModelOutput(logits=self.cls_head(states[:, 0]))
