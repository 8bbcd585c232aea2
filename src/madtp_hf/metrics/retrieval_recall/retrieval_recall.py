"""Recall at 1, 5 and 10 of image-text retrieval in both directions, as an `evaluate` module."""

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """\
Recall@k of image-text retrieval, for k = 1, 5 and 10 and in both directions: the share of images with at least one of
their texts among the k texts that score highest for them, and the share of texts with (one of) their image among the k
images that score highest. Of equal scores, that of the lower index ranks first.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `list` of `float`, or array of shape (I, T)): the scores of each of I images with all T
        texts, higher is better; kept as float32. Rows may be added image by image or in batches.
    references (`list` of `list` of `int`): the indices, from 0 to T - 1, of the texts that belong to each image.
        Several an image are usual.
    text_to_image (array of shape (T, I), *optional*): the scores of each text with all images, where retrieval in that
        direction scores pairs differently, as re-ranking the best few of each query does. Defaults to the transpose.
Returns:
    image_to_text_recall@1, image_to_text_recall@5, image_to_text_recall@10,
    text_to_image_recall@1, text_to_image_recall@5, text_to_image_recall@10 (`float`): each in [0, 1].
    mean_recall (`float`): the mean of the six.
Raises:
    ValueError: there are no images; rows of scores differ in length; a score is missing or not a number; an image has
        no text or one out of range; a text belongs to no image; or `text_to_image` has the wrong shape.
Examples:
    >>> from madtp_hf.metrics import load_metric
    >>> metric = load_metric("retrieval_recall")
    >>> result = metric.compute(predictions=[[0.9, 0.8, 0.1], [0.5, 0.2, 0.4]], references=[[0, 1], [2]])
    >>> result["image_to_text_recall@1"], result["text_to_image_recall@1"]
    (0.5, 1.0)
"""

_CITATION = """\
@inproceedings{karpathy2015deep,
    title={Deep Visual-Semantic Alignments for Generating Image Descriptions},
    author={Karpathy, Andrej and Fei-Fei, Li},
    booktitle={Conference on Computer Vision and Pattern Recognition (CVPR)},
    year={2015}
}
"""

KS = (1, 5, 10)


def _score_matrix(scores, name: str) -> np.ndarray:
    """Return the rows `scores` as a matrix (Q, C) float32."""
    lengths = {len(row) for row in scores}
    if len(lengths) > 1:
        raise ValueError(
            f"The rows of {name} have between {min(lengths)} and {max(lengths)} scores: expected equal numbers."
        )
    scores = np.asarray(scores, dtype=np.float32)
    if scores.ndim != 2:
        raise ValueError(f"{name} has shape {scores.shape}: expected a matrix with one row of scores per query.")
    missing = np.isnan(scores).any(axis=1)
    if missing.any():
        raise ValueError(
            f"Row {missing.argmax()} of {name} has a score that is missing or not a number: expected finite scores."
        )
    return scores


def _relevance(references, num_texts: int) -> np.ndarray:
    """Return which texts belong to which image: (I, T) bool."""
    relevant = np.zeros((len(references), num_texts), dtype=bool)
    for image, texts in enumerate(references):
        texts = np.asarray(texts, dtype=np.int64)
        if not texts.size:
            raise ValueError(f"Image {image} has no text in references: expected at least one index.")
        if texts.min() < 0 or texts.max() >= num_texts:
            wrong = texts[(texts < 0) | (texts >= num_texts)][0]
            raise ValueError(
                f"Image {image} has text {wrong} in references: expected indices from 0 to {num_texts - 1}, "
                "the columns of predictions."
            )
        relevant[image, texts] = True
    orphans = ~relevant.any(axis=0)
    if orphans.any():
        raise ValueError(
            f"{orphans.sum()} texts belong to no image in references, the first of them {orphans.argmax()}"
        )
    return relevant


def _ranks(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Count the candidates ahead of each query's best relevant one: scores, relevant (Q, C) -> (Q,) int64.

    Counting takes one pass, where sorting would take many; ties are broken by index.
    """
    best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
    tied = scores == best
    first = (relevant & tied).argmax(axis=1)[:, None]
    return ((scores > best) | (tied & (np.arange(scores.shape[1]) < first))).sum(axis=1)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RetrievalRecall(evaluate.Metric):
    def _info(self):
        info = evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )
        # Return rows as arrays: as Python floats, 5,000 images by 25,000 texts would take gigabytes. The format is set
        # here because the constructor rejects it for features that are not scalar, although such rows work.
        info.format = "numpy"
        return info

    def _compute(self, predictions, references, text_to_image=None):
        if not len(predictions):
            raise ValueError("predictions and references are empty: expected at least one image.")
        image_to_text = _score_matrix(predictions, "predictions")
        relevant = _relevance(references, image_to_text.shape[1])
        if text_to_image is None:
            text_to_image = image_to_text.T
        else:
            text_to_image = _score_matrix(text_to_image, "text_to_image")
        if text_to_image.shape != relevant.T.shape:
            raise ValueError(
                f"text_to_image has shape {text_to_image.shape}: expected {relevant.T.shape}, one row per text"
                " and one column per image."
            )
        ranks = {"image_to_text": _ranks(image_to_text, relevant), "text_to_image": _ranks(text_to_image, relevant.T)}
        result = {f"{way}_recall@{k}": float((ranks[way] < k).mean()) for way in ranks for k in KS}
        result["mean_recall"] = sum(result.values()) / len(result)
        return result
