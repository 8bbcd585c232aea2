"""The package's version; its home is beside the modeling files, which say in every checkpoint which they are."""

from .modeling.versions import VERSION as __version__


__all__ = ["__version__"]
