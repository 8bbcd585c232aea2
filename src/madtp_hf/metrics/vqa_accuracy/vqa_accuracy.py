"""VQA accuracy as computed by the official evaluation of VQA v1 and v2, as an `evaluate` module."""

import re
from functools import lru_cache

import datasets
import evaluate


_DESCRIPTION = """\
The accuracy of the VQA challenges. An answer is worth min(1, m / 3) where m annotators out of nine gave it; a question
has ten annotators, and its accuracy is the mean over the ten ways to leave one out: 0, 0.3, 0.6, 0.9 and 1 for an
answer that 0, 1, 2, 3 and at least 4 of the ten gave. Answers are compared after the official normalisation
(punctuation, articles, number words, contractions), which the official tool applies only where the annotators
disagree: where they all gave the same answer, only an equal one will do, letter case included.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `str`): one answer per question.
    references (`list` of `list` of `str`): each question's answers, one per annotator. Ten of them in VQA; at least
        four, for with fewer the rule can give no answer full marks. With a single true answer, repeat it: `[answer] *
        10`.
    per_question (`bool`, *optional*, defaults to `False`): also return each question's accuracy.
Returns:
    accuracy (`float`): mean over questions, in [0, 1].
    per_question (`list` of `float`): each question's accuracy, if asked for.
Raises:
    ValueError: there are no questions, or one has fewer than four answers.
Examples:
    >>> from madtp_hf.metrics import load_metric
    >>> metric = load_metric("vqa_accuracy")
    >>> metric.compute(predictions=["2"], references=[["two"] * 3 + ["many"] * 7])
    {'accuracy': 0.9}
"""

_CITATION = """\
@inproceedings{antol2015vqa,
    title={{VQA}: Visual Question Answering},
    author={Antol, Stanislaw and Agrawal, Aishwarya and Lu, Jiasen and Mitchell, Margaret and Batra, Dhruv and
        Zitnick, C. Lawrence and Parikh, Devi},
    booktitle={International Conference on Computer Vision (ICCV)},
    year={2015}
}
"""

MIN_ANSWERS = 4

# Apostrophe and colon are kept: "girl's" differs from "girls", and 2:50 is a time.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_DIGIT_COMMA = re.compile(r"\d,\d")
_NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11))), none="0")
_ARTICLES = {"a", "an", "the"}

_CONTRACTIONS_IN_FULL = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _missing_one(word: str) -> list[str]:
    """Return the spellings of `word` with one of its apostrophes left out."""
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS = {typed: word for word in _CONTRACTIONS_IN_FULL.split() for typed in _missing_one(word)}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the official table has this entry reversed


def _remove_punctuation(text: str) -> str:
    # As in the official tool, the original text decides how to treat a mark: if the mark is next to a space anywhere,
    # it is removed, otherwise replaced by a space; if a comma is between digits ("1,000"), all marks are removed.
    digit_comma = _DIGIT_COMMA.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        goes = digit_comma or mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if goes else " ")
    return _PERIOD.sub("", result, count=32)  # the official tool's limit: it passes a flag as the count


@lru_cache(maxsize=1 << 18)
def _normalize(answer: str) -> str:
    words = [_NUMBERS.get(word, word) for word in _remove_punctuation(answer).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _question_accuracy(prediction: str, answers: list[str]) -> float:
    prediction, *answers = (text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers))
    if len(set(answers)) > 1:
        prediction, *answers = map(_normalize, (prediction, *answers))
    count, matches = len(answers), answers.count(prediction)
    # Of the leave-one-out subsets of annotators, `matches` have one match fewer.
    kept, lost = min(1, matches / 3), min(1, (matches - 1) / 3)
    return ((count - matches) * kept + matches * lost) / count


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class VqaAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
            homepage="https://visualqa.org/evaluation.html",
            reference_urls=["https://github.com/GT-Vision-Lab/VQA"],
        )

    def _compute(self, predictions, references, per_question=False):
        if not predictions:
            raise ValueError("predictions and references are empty: expected at least one question.")
        for index, answers in enumerate(references):
            if len(answers) < MIN_ANSWERS:
                raise ValueError(
                    f"Question {index} has {len(answers)} answers: expected at least {MIN_ANSWERS}, which the VQA rule"
                    " needs to give full marks (VQA has ten per question). With a single true answer, pass"
                    " references=[[answer] * 10, ...]."
                )
        accuracies = [_question_accuracy(prediction, answers) for prediction, answers in zip(predictions, references)]
        result: dict[str, float | list[float]] = {"accuracy": sum(accuracies) / len(accuracies)}
        if per_question:
            result["per_question"] = accuracies
        return result
