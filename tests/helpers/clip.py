"""Small random CLIP models and inputs."""

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from madtp_hf import MadtpClipModel


START, END = 96, 97  # START and END of text; END is the highest id, as in CLIP's vocabulary


def clip_config(text_config=None, vision_config=None, **overrides) -> CLIPConfig:
    text = {
        "vocab_size": 98,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 24,
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 8,
    }
    return CLIPConfig(
        text_config={**text, **(text_config or {})},
        vision_config={**vision, **(vision_config or {})},
        **{"projection_dim": 16, **overrides},
    )


def make_clip(**overrides) -> CLIPModel:
    """Build a small random CLIP whose tokens differ from one another, as in trained models."""
    torch.manual_seed(1)
    model = CLIPModel(clip_config(**overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.2 / parameter.std() if "embedding" in name else 2.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def make_clip_model(config_overrides=None, **overrides) -> MadtpClipModel:
    return MadtpClipModel.from_clip(make_clip(**overrides), **{"num_alignment_tokens": 12, **(config_overrides or {})})


def make_texts(lengths=(9, 5, 7), width=None, pad=0, seed=0) -> torch.Tensor:
    """Return texts of these lengths, with start and end tokens, padded on the right to `width` or the longest."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), width or max(lengths)), pad)
    for row, length in zip(ids, lengths):
        row[:length] = torch.randint(4, 90, (length,), generator=generator)
        row[0], row[length - 1] = START, END
    return ids


def make_clip_inputs(lengths=(9, 5, 7), seed=0, image_size=48, width=None, pad=0) -> dict[str, torch.Tensor]:
    """Return texts, their masks, and images of different contrast, so that samples keep different token counts."""
    ids = make_texts(lengths, width, pad, seed)
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.3, 2.0, len(lengths))[:, None, None, None]
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long(),
        "pixel_values": torch.randn(len(lengths), 3, image_size, image_size, generator=generator) * scale,
    }


def make_clip_processor() -> CLIPProcessor:
    """Build a processor for the small models: a tokenizer of single letters and 48 x 48 pixel images."""
    letters = "abcdefghijklmnopqrstuvwxyz.,?"
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [f"<|unused{index}|>" for index in range(START - len(words))] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=24)
    images = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    return CLIPProcessor(images, tokenizer)
