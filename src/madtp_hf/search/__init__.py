"""Image search: embeddings of images and texts, an index of them, and queries."""

from .embedding import encode_images, encode_texts
from .index import ImageIndex, index_images, load_index, search


__all__ = ["ImageIndex", "encode_images", "encode_texts", "index_images", "load_index", "search"]
