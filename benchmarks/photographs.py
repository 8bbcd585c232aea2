"""Images for timing that need no download: crops of the two photographs in scikit-learn, and digit scenes.

How many tokens a pruned model keeps depends on the image; on noise the counts differ from those on photographs.
"""

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from madtp_hf.data.digit_scenes import draw_scenes


SMALLEST_CROP = 96  # pixels; the largest is as high as the photograph, 427


def to_pixel_values(images, size: int) -> torch.Tensor:
    """Convert PIL images to pixel_values (n, 3, size, size), resized and normalised as in BLIP's image processor."""
    resized = [image.resize((size, size), Image.Resampling.BICUBIC) for image in images]
    pixels = torch.from_numpy(np.stack(resized)).float() / 255
    normalised = (pixels - torch.tensor(OPENAI_CLIP_MEAN)) / torch.tensor(OPENAI_CLIP_STD)
    return normalised.permute(0, 3, 1, 2).contiguous()


def draw_crops(n: int, seed: int) -> list[Image.Image]:
    """Return `n` square crops of either photograph, at random positions and of random sizes."""
    rng = np.random.default_rng(seed)
    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    crops = []
    for _ in range(n):
        photograph = photographs[rng.integers(len(photographs))]
        side = int(rng.integers(SMALLEST_CROP, min(photograph.size) + 1))
        left, top = (int(rng.integers(0, length - side + 1)) for length in photograph.size)
        crops.append(photograph.crop((left, top, left + side, top + side)))
    return crops


def photograph_crops(n: int, size: int, seed: int) -> torch.Tensor:
    """Return `n` random square crops of either photograph as pixel_values (n, 3, size, size)."""
    return to_pixel_values(draw_crops(n, seed), size)


def mixed_images(n: int, size: int, seed: int) -> torch.Tensor:
    """Return `n` images, half photograph crops and half digit scenes, shuffled, as pixel_values (n, 3, size, size)."""
    rng = np.random.default_rng(seed)
    num_scenes = n // 2
    scenes = [Image.fromarray(image) for image in draw_scenes(num_scenes, "test", rng).images] if num_scenes else []
    images = photograph_crops(n - num_scenes, size, seed)
    if scenes:
        images = torch.cat([images, to_pixel_values(scenes, size)])
    return images[torch.from_numpy(rng.permutation(n))]
