"""NLVR2 accuracy and consistency as in the data set's own evaluation script, as an `evaluate` module."""

import datasets
import evaluate


_DESCRIPTION = """\
Accuracy on NLVR2, and consistency: the share of unique sentences that are judged rightly for every pair of images they
are paired with. An identifier "dev-850-0-1" reads split-set-pair-sentence; examples with the same split, set and
sentence share their sentence.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `int`): 1 where the sentence is taken to be true of the two images, 0 otherwise.
    references (`list` of `int`): the same, in truth.
    identifiers (`list` of `str`, *optional*): the data set's identifiers, in the order of the predictions. Without
        them there is no consistency.
Returns:
    accuracy (`float`): in [0, 1].
    consistency (`float`): in [0, 1]; only with `identifiers`.
Raises:
    ValueError: there are no examples, a label is neither 0 nor 1, or the identifiers are too many or too few,
    malformed or not unique.
Examples:
    >>> from madtp_hf.metrics import load_metric
    >>> metric = load_metric("nlvr2")
    >>> identifiers = ["dev-850-0-0", "dev-850-1-0", "dev-850-0-1", "dev-850-1-1"]
    >>> metric.compute(predictions=[1, 0, 1, 0], references=[1, 0, 1, 1], identifiers=identifiers)
    {'accuracy': 0.75, 'consistency': 0.5}
"""

_CITATION = """\
@inproceedings{suhr2019corpus,
    title={A Corpus for Reasoning about Natural Language Grounded in Photographs},
    author={Suhr, Alane and Zhou, Stephanie and Zhang, Ally and Zhang, Iris and Bai, Huajun and Artzi, Yoav},
    booktitle={Annual Meeting of the Association for Computational Linguistics (ACL)},
    year={2019}
}
"""


def _sentence(identifier: str) -> tuple[str, ...]:
    """Return the parts of an identifier that name the sentence: "dev-850-0-1" -> ("dev", "850", "1")."""
    parts = identifier.split("-")
    if len(parts) != 4:
        raise ValueError(
            f"Identifier {identifier!r} is not of the form split-set-pair-sentence: expected e.g. 'dev-850-0-1'."
        )
    split, image_set, _, sentence = parts
    return split, image_set, sentence


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Nlvr2(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
            homepage="https://lil.nlp.cornell.edu/nlvr/",
            reference_urls=["https://github.com/lil-lab/nlvr/tree/master/nlvr2"],
        )

    def _compute(self, predictions, references, identifiers=None):
        if not predictions:
            raise ValueError("predictions and references are empty: expected at least one example.")
        for name, labels in (("prediction", predictions), ("reference", references)):
            unknown = set(labels) - {0, 1}
            if unknown:
                raise ValueError(f"{name} {min(unknown)}: expected 1 (true) or 0 (false).")
        right = [prediction == reference for prediction, reference in zip(predictions, references)]
        result = {"accuracy": sum(right) / len(right)}
        if identifiers is not None:
            if len(identifiers) != len(right):
                raise ValueError(
                    f"{len(identifiers)} identifiers for {len(right)} predictions: expected one for each."
                )
            if len(set(identifiers)) != len(identifiers):
                raise ValueError("identifiers has one of them twice: evaluate each example once.")
            consistent: dict[tuple[str, ...], bool] = {}
            for identifier, is_right in zip(identifiers, right):
                sentence = _sentence(identifier)
                consistent[sentence] = consistent.get(sentence, True) and is_right
            result["consistency"] = sum(consistent.values()) / len(consistent)
        return result
