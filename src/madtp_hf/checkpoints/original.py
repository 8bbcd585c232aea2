"""Read files, tensors and sizes of original checkpoints, for BLIP and CLIP alike."""

import math
import re
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file


# Tensors that are not the model's: momentum encoders, feature queues, index and mask buffers, the contrastive
# temperature and the manually scheduled one; the text decoder's projection to the alignment tokens, which it never
# uses; and the three sizes that CLIP's files hold among the weights.
_TRAINING_ONLY = re.compile(
    r"(^|\.)(position_ids|attn_mask)$|^(visual_encoder|text_encoder|text_decoder|vision_proj|text_proj)_m\.|_queue$"
    r"|^queue_ptr$|^ptr_queue$|^temperature$|^temp$|^text_decoder\.bert\.encoder\.txt_query_model\."
    r"|^(visual|transformer|token_embedding|positional_embedding|ln_final|text_projection|logit_scale)_m(\.|$)"
    r"|^(input_resolution|context_length|vocab_size)$"
)
_WRAPPERS = re.compile(r"(^|\.)(?:(?:module|_orig_mod)\.)+")  # put into names by DistributedDataParallel and compile
_NESTED = ("state_dict", "model", "module")  # where training code puts the state dict: open_clip, BLIP, DeepSpeed


def read_checkpoint(path) -> dict:
    """Read an original checkpoint: `.safetensors`, `.pth` or `.pt` with `weights_only=True`, or a TorchScript archive.

    Returns:
        What the file holds: the state dict, or a dict with it and the training state next to it.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is damaged, holds more than tensors and plain values, or has no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint file at {path}.")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        elif (code := _read_torchscript(path)) is not None:
            # Loading runs none of an archive's code but `__setstate__`, which archives of weights don't have.
            if "__setstate__" in code:
                raise ValueError("weights_only: GLOBAL __setstate__")
            content = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a malicious or damaged pickle can raise any exception
        known = isinstance(error, (SafetensorError, RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile))
        if known and "weights_only" not in str(error):
            raise ValueError(f"{path} can't be read as a checkpoint, it may be truncated: {error}") from error
        # torch's own message explains how to load the file anyway, which would run the code that was just found in it.
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} was refused: it is damaged, or contains more than tensors and plain"
            f" values{f' ({found[1]})' if found else ''}, which could run code; expected the file as its authors"
            " published it, or only its weights as .safetensors."
        ) from None
    own_tensors(content, path)
    return dict(content)


def _read_torchscript(path: Path) -> str | None:
    """Return the code in a TorchScript archive, as OpenAI publishes CLIP, without running it; None for other files."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if not any(name.endswith("/constants.pkl") for name in names):
            return None
        return "\n".join(archive.read(name).decode() for name in names if name.endswith(".py"))


def own_tensors(content, source) -> dict[str, torch.Tensor]:
    """Return the model's own tensors in a checkpoint by their original names; `source` names it in errors.

    The state dict may be nested in what training code saves, and its names may have `module.` and `_orig_mod.` in
    them.
    """
    named = content
    while isinstance(named, dict) and (key := next((k for k in _NESTED if isinstance(named.get(k), dict)), None)):
        named = named[key]
    tensors = {
        _WRAPPERS.sub(r"\1", name): tensor
        for name, tensor in (named.items() if isinstance(named, dict) else ())
        if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }
    if not tensors:
        raise ValueError(
            f'{source} contains no state dict: expected one, at the top or under "model" or "state_dict".'
        )
    return {name: tensor for name, tensor in tensors.items() if not _TRAINING_ONLY.search(name)}


def shape_of(state_dict: dict[str, torch.Tensor], name: str, *axes: str) -> tuple[int, ...]:
    """Return a tensor's shape; raise a `ValueError` unless it has the dimensions that `axes` name."""
    shape = tuple(state_dict[name].shape)
    if len(shape) != len(axes) or 0 in shape:
        raise ValueError(f"The checkpoint's {name} has shape {shape}: expected ({', '.join(axes)}).")
    return shape


def read_patches(state_dict: dict[str, torch.Tensor], kernel: str, positions: str) -> tuple[int, int, int]:
    """Return the vision tower's width, the patch size in pixels, and the number of patches along an image's side.

    kernel, positions: the names of the patch convolution's weight and the position embeddings (..., 1 + patches, D).
    """
    width, _, patch_size, _ = shape_of(state_dict, kernel, "width", "3", "patch size", "patch size")
    axes = ("1 + patches", "width") if state_dict[positions].ndim == 2 else ("1", "1 + patches", "width")
    number = shape_of(state_dict, positions, *axes)[-2]
    grid = math.isqrt(number - 1)
    if grid == 0 or grid**2 != number - 1:
        raise ValueError(
            f"The checkpoint's {positions} has {number} positions: expected one for the class token and n x n for"
            " a square of patches."
        )
    return width, patch_size, grid


def resize_positions(
    state_dict: dict[str, torch.Tensor], kernel: str, positions: str, image_size: int
) -> torch.Tensor:
    """Interpolate position embeddings (..., 1 + patches, D) to another image size, bicubic as in BLIP.

    The class token's embedding is unchanged.
    """
    _, patch_size, grid = read_patches(state_dict, kernel, positions)
    if not isinstance(image_size, int) or image_size <= 0 or image_size % patch_size:
        raise ValueError(
            f"image_size={image_size!r}: expected a multiple of the checkpoint's patch size, {patch_size}, such as"
            f" its own size, {grid * patch_size}."
        )
    given = state_dict[positions]
    if image_size == grid * patch_size:
        return given
    embedding = given.view(1, -1, given.shape[-1])
    patches = embedding[:, 1:].transpose(1, 2).unflatten(2, (grid, grid)).float()
    patches = F.interpolate(patches, size=(image_size // patch_size,) * 2, mode="bicubic", align_corners=False)
    resized = torch.cat([embedding[:, :1], patches.flatten(2).transpose(1, 2).to(embedding.dtype)], dim=1)
    return resized.view(*given.shape[:-2], -1, given.shape[-1])
