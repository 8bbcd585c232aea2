"""Decode an image as people have it, whatever its format, to 8-bit RGB, upright."""

import os
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


def open_image(source) -> Image.Image:
    """Read an image file and return it as 8-bit RGB, turned upright by its EXIF orientation.

    Of an animation it is the first frame. 16-bit images are scaled to 8 bits, transparent pixels are shown on white.

    Args:
        source (`str`, `os.PathLike`, `bytes` or `PIL.Image.Image`):
            A path, the content of an image file, or an image that is open already.

    Returns:
        `PIL.Image.Image` in mode `"RGB"`, which holds no file open.

    Raises:
        ValueError: if there is no readable image. The message is the reason alone, short, without the path.
        TypeError: for a source of another type.
    """
    if isinstance(source, Image.Image):
        return _decode(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise ValueError("the file is empty")
        return _open(BytesIO(source))
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"The image is a {type(source).__name__}: expected a path, bytes or a PIL image.")
    try:
        if not os.stat(source).st_size:
            raise ValueError("the file is empty")
        with open(source, "rb") as file:
            return _open(file)
    except OSError as error:
        raise ValueError((error.strerror or str(error)).lower()) from error


def _open(file) -> Image.Image:
    try:
        image = Image.open(file)
    except UnidentifiedImageError as error:
        raise ValueError("not an image, or of an unknown format") from error
    except Exception as error:  # broken files make Pillow's plugins raise nearly anything
        raise ValueError(_reason(error)) from error
    with image:
        return _decode(image)


def _decode(image: Image.Image) -> Image.Image:
    try:
        image.load()  # of an animation, the frame that it stands at: the first
        return _to_rgb(_upright(image))
    except Exception as error:
        raise ValueError(_reason(error)) from error


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
    """A copy of the image, turned."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels are good, the EXIF data is not: as if there were none
        return image.copy()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        # Pillow would cut off what is above 255.
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        top = 65535 if image.mode.startswith("I;16") or values.max() > 255 else 255
        if image.mode == "F" and values.max() <= 1:
            top = 1
        return Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
