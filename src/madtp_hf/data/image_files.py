"""Files of images: their suffixes, those in a folder, and the one rule for paths in data files."""

import os
import re
from collections.abc import Iterator


IMAGE_SUFFIXES = tuple(
    ".apng .avif .bmp .dib .gif .heic .heif .ico .j2k .jfif .jp2 .jpe .jpeg .jpg .jpx .mpo .pbm .pcx .pgm .png .pnm"
    " .ppm .psd .qoi .tga .tif .tiff .webp".split()
)
# With "..", in Windows or POSIX syntax, whatever the system of this machine; or absolute.
_PARENT = re.compile(r"(.*[/\\])?\.\.([/\\]|$)", re.DOTALL)
_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:")


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def walk_images(folder) -> Iterator[tuple[str, str | None]]:
    """Yield (path relative to `folder`, None) for each image, and (path, reason) for each folder that can't be read.

    The order is fixed: folder by folder, by name. Hidden files and folders are left out, links to folders aren't
    followed. A folder or a broken symlink that is named like an image is included: reading it gives the reason.
    """
    failed: list[OSError] = []
    for parent, folders, files in os.walk(folder, onerror=failed.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = "" if parent == os.fspath(folder) else os.path.join(os.path.relpath(parent, folder), "")
        for name in sorted(files + folders):
            if is_image(name) and not name.startswith("."):
                yield inside + name, None
    for error in failed:
        yield os.path.relpath(error.filename, folder), f"the folder can't be read: {(error.strerror or '').lower()}"


def path_inside(image: str, folder, allow_absolute: bool = True) -> str:
    """Return the path of an image that a data file names; links inside the image folder are its owner's, and followed.

    Raises:
        ValueError: if the path leads out of `folder`: it has "..", or is absolute and elsewhere.
    """
    folder = folder if os.path.isabs(folder) else os.path.abspath(folder)
    path = os.path.normpath(os.path.join(folder, image))
    is_inside = allow_absolute and os.path.isabs(image) and path.startswith(os.path.join(folder, ""))
    if _PARENT.match(image) or (_ABSOLUTE.match(image) and not is_inside):
        raise ValueError(
            f"image path {image!r} leads out of the image folder {folder}: expected one relative to it, without '..'"
        )
    return path
