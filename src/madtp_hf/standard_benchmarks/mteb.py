"""MTEB and MIEB evaluate the features of CLIP and of BLIP for retrieval:

    python -m madtp_hf.standard_benchmarks.mteb run --model outputs/clip --reductions 0 0.5 0.8 \\
        --tasks Flickr30kT2IRetrieval

`--model`, `--model-revision`, `--reductions` and `--precision` are read here; the rest is mteb's own command line.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..jobs.reading import prepare
from ..jobs.workers import TextEmbedder
from ..modeling.images import read_image
from . import load_to_evaluate


class MtebEncoder:
    """A model as mteb's `EncoderProtocol`.

    Args:
        model_name (`str`): The name in mteb's registry.
        revision (`str`, *optional*): The commit on the Hub.
        device (`str`, *optional*): As mteb passes it.
        source (`str`, *optional*): The checkpoint's folder or Hub id, by default `model_name`.
        reduction (`float`, *optional*), precision (`str`): See `load_to_evaluate`, also for the errors.
    """

    model: Any
    mteb_model_meta: Any = None

    def __init__(self, model_name, revision=None, device=None, *, source=None, reduction=None, precision="float32"):
        how = {"device": device, "precision": precision, "revision": revision}
        loaded = load_to_evaluate(source or model_name, TextEmbedder.tasks, reduction, **how)
        self.model, self.processor = loaded.model, loaded.processor
        self._worker = TextEmbedder(self.model, self.processor)

    @torch.no_grad()
    def encode(self, inputs, *, task_metadata=None, hf_split=None, hf_subset=None, prompt_type=None, **options):
        """Return the features of texts, or of images, as the model gives them: only BLIP's are L2-normalised.

        Rows with a text and an image give the sum of both features. These are the conventions of mteb's own wrappers
        of CLIP and BLIP.

        Args:
            inputs (`Iterable[dict]`): Batches with the lists `"text"`, `"image"` or both.

        Returns:
            `torch.Tensor` of float32, `(num_rows, embedding_size)`, on the CPU.
        """
        readers = {"text": self._encode_texts, "image": self._encode_images}
        found = []
        for batch in inputs:
            features = [read(batch[name]) for name, read in readers.items() if name in batch]
            if not features:
                raise ValueError(f"The batch has {', '.join(batch)}: expected text, image or both.")
            found.append(torch.stack(features).sum(dim=0))
        return torch.cat(found)

    def _encode_texts(self, texts) -> torch.Tensor:
        return self.model.get_text_features(**self._worker.tokens(list(texts))).pooler_output.float().cpu()

    def _encode_images(self, images) -> torch.Tensor:
        pixels = np.stack([prepare(read_image(image), self.processor.image_processor) for image in images])
        values = self._worker.pixel_values(pixels)
        return self.model.get_image_features(values).pooler_output.float().cpu()

    def similarity(self, embeddings1, embeddings2):
        """Return the cosine similarities (N, M) of two sets of features."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1, embeddings2):
        """Return the cosine similarities (N,) of pairs of features."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


def register_with_mteb(
    source: str, reduction: float | None = None, precision: str = "float32", revision: str | None = None
):
    """Register a checkpoint with mteb, whose `get_model` then loads it, and return its `ModelMeta`.

    A Hub id is the name; a folder's is its last two parts. mteb files results by name, reduction and precision.
    Arguments are those of `load_to_evaluate`.
    """
    from mteb.models.model_implementations import MODEL_REGISTRY
    from mteb.models.model_meta import ModelMeta

    folder = Path(source).expanduser().resolve()
    name = f"{folder.parent.name}/{folder.name}" if folder.is_dir() else source
    experiment = {"reduction": reduction, "precision": None if precision == "float32" else precision}
    unknown = "n_parameters memory_usage_mb max_tokens embed_dim license open_weights release_date".split()
    unknown += ["public_training_code", "public_training_data", "training_datasets"]
    meta = ModelMeta(
        loader=MtebEncoder,
        loader_kwargs={"source": str(folder) if folder.is_dir() else source},
        name=name,
        revision=revision,
        languages=["eng-Latn"],
        modalities=["image", "text"],
        framework=["PyTorch", "Transformers"],
        similarity_fn_name="cosine",
        use_instructions=False,
        experiment_kwargs={key: value for key, value in experiment.items() if value is not None} or None,
        **dict.fromkeys(unknown),
    )
    MODEL_REGISTRY[name] = meta
    return meta


def run_mteb() -> None:
    """Run mteb's command line once for each reduction."""
    from mteb.cli import main as run

    about = "Run a command of mteb, such as run, with a checkpoint of this package and mteb's own options."
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("--model", "-m", required=True, help="The checkpoint's folder or Hub id.")
    parser.add_argument("--model-revision", help="The branch, tag or commit on the Hub.")
    parser.add_argument(
        "--reductions", type=float, nargs="+", default=[None], help="Shares of FLOPs to save; by default as saved."
    )
    parser.add_argument("--precision", default="float32", help="float32, bfloat16 or int8.")
    options, rest = parser.parse_known_args()
    if not rest or rest[0].startswith("-"):
        parser.error("The first argument is missing: expected a command of mteb, such as run.")
    for reduction in options.reductions:
        meta = register_with_mteb(options.model, reduction, options.precision, options.model_revision)
        sys.argv = ["mteb", rest[0], "--model", meta.name, *rest[1:]]
        run()


if __name__ == "__main__":
    run_mteb()
