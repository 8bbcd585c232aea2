"""BLEU, CIDEr, ROUGE-L, METEOR and SPICE of captions, computed by `pycocoevalcap`, as an `evaluate` module."""

import contextlib
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import evaluate


_DESCRIPTION = """\
The metrics of COCO captioning: BLEU-1 to 4, CIDEr (the CIDEr-D of the COCO evaluation), ROUGE-L, METEOR and SPICE, all
by the library pycocoevalcap (`pip install pycocoevalcap`), on captions split into words by the Penn Treebank
tokenizer.

METEOR, SPICE and that tokenizer are Java programs. Without Java, METEOR and SPICE are left out and a simple tokenizer
takes over, which may move the other scores a little; a warning says so. SPICE, computed only if asked for, needs Java
8 or 11 and 8 GB of memory, and downloads 400 MB of Stanford models the first time.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `str`): one caption per image.
    references (`list` of `list` of `str`): each image's captions by people, at least one.
    metrics (`tuple` of `str`, *optional*, defaults to `("bleu", "cider", "rouge", "meteor")`): which to compute, of
        "bleu", "cider", "rouge", "meteor" (needs Java) and "spice" (needs Java and, the first time, a network).
    tokenizer (`str`, *optional*, defaults to `"auto"`): "ptb", the Penn Treebank tokenizer of published numbers (needs
        Java); "simple", ours; or "auto", the first if it works and otherwise, with a warning, the second.
Returns:
    bleu_1, bleu_2, bleu_3, bleu_4, rouge_l, meteor, spice (`float`): in [0, 1].
    cider (`float`): in [0, 10]. Words are weighted by how few images' references have them, so with a single image it
        is 0.
Raises:
    ImportError: pycocoevalcap is not installed.
    ValueError: there are no captions, an image has no reference, no reference has a word, or a metric or tokenizer is
    unknown.
    RuntimeError: `tokenizer="ptb"` and the tokenizer does not run.
Examples:
    >>> from madtp_hf.metrics import load_metric
    >>> metric = load_metric("caption_metrics")
    >>> captions = ["two dogs on a beach", "a red bus"]
    >>> references = [[caption] for caption in captions]
    >>> result = metric.compute(predictions=captions, references=references, metrics=("bleu", "rouge"))
    >>> round(result["bleu_1"], 6), round(result["rouge_l"], 6)
    (1.0, 1.0)
"""

_CITATION = """\
@article{chen2015microsoft,
    title={Microsoft {COCO} Captions: Data Collection and Evaluation Server},
    author={Chen, Xinlei and Fang, Hao and Lin, Tsung-Yi and Vedantam, Ramakrishna and Gupta, Saurabh and
        Doll{\\'a}r, Piotr and Zitnick, C. Lawrence},
    journal={arXiv preprint arXiv:1504.00325},
    year={2015}
}
"""

METRICS = ("bleu", "cider", "rouge", "meteor", "spice")
DEFAULT_METRICS = ("bleu", "cider", "rouge", "meteor")
TOKENIZERS = ("auto", "ptb", "simple")
# The metrics that are left out without Java, and their names in the warning.
_JAVA_METRICS = {"meteor": "METEOR", "spice": "SPICE (it needs Java 8 or 11 and, the first time, a network)"}

_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))(?!\w)")
# A token: an abbreviation (p.m.), the rest of a contraction ('s), a word or number with marks inside (black-and-white,
# 1,000.5), or a sign.
_TOKEN = re.compile(r"(?:[^\W\d_]\.){2,}|'(?:s|re|ve|ll|d|m)(?!\w)|\w+(?:(?:[-./'@]|(?<=\d)[,:](?=\d))\w+)*|[$%&#]")


def simple_tokenize(captions: list[str]) -> list[str]:
    """Lower-case captions, separate words by spaces and drop punctuation, close to the Penn Treebank tokenizer.

    Contractions are split in the same way: "dog's" -> "dog 's", "don't" -> "do n't".
    """
    plain = (caption.lower().replace("\u2019", "'") for caption in captions)
    return [" ".join(_TOKEN.findall(_CLITIC.sub(r" \1 ", caption))) for caption in plain]


def ptb_tokenize(captions: list[str]) -> list[str]:
    """Tokenize captions as the COCO evaluation does: Stanford's Penn Treebank tokenizer, lower case, no punctuation.

    The library's own wrapper of this program writes into the library's folder, depends on the locale's encoding and
    prints to the terminal, so only the library's jar and list of punctuation marks are used here.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    options = ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", *options]
    text = "".join(caption + "\n" for caption in captions)
    output = subprocess.run(command, input=text.encode(), capture_output=True, check=True).stdout.decode()
    lines = output.split("\n")[:-1]
    if len(lines) != len(captions):
        raise RuntimeError(f"the tokenizer answered {len(captions)} captions with {len(lines)}")
    dropped = ptbtokenizer.PUNCTUATIONS
    return [" ".join(word for word in line.rstrip().split(" ") if word not in dropped) for line in lines]


def java_problem() -> str | None:
    """Return why Java programs cannot run here, or `None` if they can."""
    if shutil.which("java") is None:
        return "Java is not installed"
    # macOS has a stub `java` that only says where to get one.
    if subprocess.run(["java", "-version"], capture_output=True).returncode != 0:
        return "the java command does not work"
    return None


def _attempt(run, *inputs):
    """Run a function that needs Java; return its result and `None`, or `None` and the reason of the failure."""
    problem = java_problem()
    if problem:
        return None, problem
    try:
        return run(*inputs), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _silence():
    """Suppress the standard output of Python code and of the programs it starts."""
    sys.stdout.flush()
    terminal = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(io.StringIO()):
            os.dup2(nowhere.fileno(), 1)
            yield
    finally:
        os.dup2(terminal, 1)
        os.close(terminal)


def _score(metric: str, references: dict[int, list[str]], predictions: dict[int, list[str]]) -> dict[str, float]:
    """Compute one metric with the library, on tokenized captions."""
    module = importlib.import_module(f"pycocoevalcap.{metric}.{metric}")
    with _silence() if metric == "spice" else contextlib.nullcontext():
        scorer = getattr(module, metric.capitalize())()
        try:
            options = {"verbose": 0} if metric == "bleu" else {}
            score, _ = scorer.compute_score(references, predictions, **options)
        finally:
            if metric == "meteor":
                # The scorer would keep its pipes open and, after a failure, wait forever for its own lock.
                with contextlib.suppress(BrokenPipeError), scorer.meteor_p:
                    scorer.meteor_p.kill()
                if scorer.lock.locked():
                    scorer.lock.release()
    if metric == "bleu":
        return {f"bleu_{n}": float(of_n) for n, of_n in enumerate(score, start=1)}
    return {"rouge_l" if metric == "rouge" else metric: float(score)}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class CaptionMetrics(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
            homepage="https://cocodataset.org/#captions-eval",
            codebase_urls=["https://github.com/salaniz/pycocoevalcap"],
        )

    def _download_and_prepare(self, dl_manager):
        # There is nothing to download, but a missing library is reported before captions are generated.
        try:
            import pycocoevalcap.bleu.bleu  # noqa: F401
        except ImportError as error:
            raise ImportError("caption_metrics needs pycocoevalcap: pip install 'madtp_hf[metrics]'.") from error

    def _compute(self, predictions, references, metrics=DEFAULT_METRICS, tokenizer="auto"):
        metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
        for metric in metrics:
            if metric not in METRICS:
                raise ValueError(f"metrics has {metric!r}: expected some of {', '.join(METRICS)}.")
        if tokenizer not in TOKENIZERS:
            raise ValueError(f"tokenizer={tokenizer!r}: expected one of {', '.join(TOKENIZERS)}.")
        if not predictions:
            raise ValueError("predictions and references are empty: expected at least one caption.")
        for index, captions in enumerate(references):
            if not captions:
                raise ValueError(f"Image {index} has no reference caption: expected at least one.")

        # All captions in one call, since starting Java takes longer than tokenizing. "|||" is METEOR's separator.
        captions = [caption for group in ([predictions], references) for row in group for caption in row]
        captions = [" ".join(caption.replace("|||", " ").split()) for caption in captions]
        words = None
        differences = {}  # cause -> its effects on the results
        if tokenizer != "simple":
            words, problem = _attempt(ptb_tokenize, captions)
            if problem and tokenizer == "ptb":
                raise RuntimeError(f"The Penn Treebank tokenizer does not run: {problem}.")
            if problem:
                differences[problem] = [
                    "captions were split by a simple tokenizer, not the Penn Treebank's, and scores may differ"
                    " slightly from "
                    "published ones"
                ]
        rows = iter(simple_tokenize(captions) if words is None else words)
        predictions = {index: [next(rows)] for index in range(len(predictions))}
        references = {index: [next(rows) for _ in captions] for index, captions in enumerate(references)}
        if not any(caption for captions in references.values() for caption in captions):
            raise ValueError("No reference caption has a word in it: expected at least one word.")

        result: dict[str, float] = {}
        for metric in sorted(set(metrics), key=METRICS.index):
            if metric in _JAVA_METRICS:
                scores, problem = _attempt(_score, metric, references, predictions)
                if problem:
                    differences.setdefault(problem, []).append(f"{_JAVA_METRICS[metric]} was left out")
            else:
                scores = _score(metric, references, predictions)
            result.update(scores or {})
        if differences:
            told = "; ".join(f"{', '.join(effects)} [{cause}]" for cause, effects in differences.items())
            warnings.warn(f"caption_metrics: {told}.", stacklevel=2)
        return result
