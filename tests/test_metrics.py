import doctest
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from madtp_hf.metrics import METRICS, load_metric


pytest.importorskip("evaluate", reason="metrics need the evaluate library: pip install evaluate")
FOLDER = Path(sys.modules["madtp_hf.metrics"].__file__).parent
HAS_JAVA = shutil.which("java") is not None


def load(name):
    if name == "caption_metrics":
        pytest.importorskip("pycocoevalcap.bleu.bleu", reason="caption_metrics needs pycocoevalcap")
    return load_metric(name)


def script_of(metric):
    """The module that `evaluate` made of a metric's script."""
    return sys.modules[type(metric).__module__]


EXAMPLES = {
    "vqa_accuracy": (["2", "no"], [["two"] * 3 + ["many"] * 7, ["no"] * 10], {}),
    "nlvr2": ([1, 0], [1, 1], {"identifiers": ["dev-1-0-0", "dev-1-1-0"]}),
    "retrieval_recall": ([[0.9, 0.8, 0.1], [0.5, 0.2, 0.4]], [[0, 1], [2]], {}),
    "caption_metrics": (
        ["a red bus", "two dogs"],
        [["a bus"], ["two dogs", "dogs"]],
        {"tokenizer": "simple", "metrics": ("bleu", "cider", "rouge")},
    ),
}


# loading, and what all have in common


def test_every_folder_is_a_metric():
    assert METRICS == tuple(
        sorted(path.parent.name for path in FOLDER.glob("*/*.py") if path.stem == path.parent.name)
    )


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match=r"There is no metric 'bleu': expected one of .*nlvr2"):
        load_metric("bleu")


def test_a_missing_evaluate_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ImportError, match="pip install 'madtp_hf"):
        load_metric("nlvr2")


@pytest.mark.parametrize("name", METRICS)
def test_calls_do_not_change_one_another(name):
    predictions, references, options = EXAMPLES[name]
    metric = load(name)
    expected = metric.compute(predictions=predictions, references=references, **options)
    assert expected and all(isinstance(value, float) for value in expected.values())
    with pytest.raises(ValueError):
        metric.compute(predictions=predictions, references=references[:1], **options)
    with pytest.raises(ValueError, match="are empty"):
        metric.compute(predictions=[], references=[], **options)
    assert metric.compute(predictions=predictions, references=references, **options) == expected
    for prediction, reference in zip(predictions, references):
        metric.add_batch(predictions=[prediction], references=[reference])
    assert metric.compute(**options) == expected
    for prediction, reference in zip(predictions, references):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute(**options) == expected


@pytest.mark.parametrize("name", METRICS)
def test_metrics_describe_themselves(name):
    metric = load(name)
    assert metric.description and metric.citation.startswith("@") and metric.name == name
    examples = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, name, None, None)
    assert examples.examples and doctest.DocTestRunner().run(examples).failed == 0


def test_processes_may_load_at_once_from_any_folder_with_an_empty_cache(tmp_path):
    code = (
        "import sys, evaluate; metric = evaluate.load(sys.argv[1]); "
        "print(metric.compute(predictions=[1, 0], references=[1, 1])['accuracy'])"
    )
    environment = dict(os.environ, HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1", HF_EVALUATE_OFFLINE="1")
    for variable in ("HF_MODULES_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE"):
        environment.pop(variable, None)
    command = [sys.executable, "-c", code, str(FOLDER / "nlvr2")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) for _ in range(2)]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert output == "0.5\n", errors


def test_a_changed_script_is_read_anew(tmp_path):
    import evaluate

    script = tmp_path / "nlvr2" / "nlvr2.py"
    shutil.copytree(FOLDER / "nlvr2", script.parent)
    inputs = {"predictions": [1, 0], "references": [1, 1]}
    assert evaluate.load(str(script.parent), keep_in_memory=True).compute(**inputs) == {"accuracy": 0.5}
    script.write_text(script.read_text().replace('{"accuracy": ', '{"share": '))
    assert evaluate.load(str(script.parent), keep_in_memory=True).compute(**inputs) == {"share": 0.5}


def test_metrics_with_files_work_side_by_side():
    predictions, references, _ = EXAMPLES["retrieval_recall"]
    metrics = [load_metric("retrieval_recall", keep_in_memory=False, experiment_id=f"test{n}") for n in range(2)]
    for metric, row in product(metrics, range(2)):
        metric.add_batch(predictions=predictions[row : row + 1], references=references[row : row + 1])
    assert metrics[0].compute() == metrics[1].compute()


# question answering


@pytest.mark.parametrize("matches, accuracy", ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)))
def test_vqa_rule_over_ten_annotators(matches, accuracy):
    answers = ["yes"] * matches + ["no"] * (10 - matches)
    assert load("vqa_accuracy").compute(predictions=["yes"], references=[answers])["accuracy"] == pytest.approx(
        accuracy
    )


def test_vqa_gives_the_mean_and_each_question():
    # The first two are the worked example of the authors: https://github.com/GT-Vision-Lab/VQA/issues/1
    answers = ["yes"] * 8 + ["no"] * 2
    result = load("vqa_accuracy").compute(
        predictions=["no", "yes", "maybe"], references=[answers, answers, answers], per_question=True
    )
    assert result["per_question"] == pytest.approx([0.6, 1.0, 0.0])
    assert result["accuracy"] == pytest.approx(1.6 / 3)


@pytest.mark.parametrize(
    "written, same",
    (
        ("two", "2"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("a red bus", "red bus"),
        ("The man and an umbrella", "man and umbrella"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # the official table has spellings with one apostrophe missing
        ("couldnt've", "couldn't've"),
        ("oclock", "o'clock"),
        ("somebody'd", "somebodyd"),
        ("1,000", "1000"),
        ("100,978 people", "100978 people"),
        ("2.5", "2.5"),
        ("st. louis.", "st louis"),
        ("Yes!", "yes"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("red, white", "red white"),
        ("t-shirt", "t shirt"),
        ("t-shirt, 1,000", "tshirt 1000"),  # a comma between digits anywhere, and marks leave no space
        ("2:50 pm", "2:50 pm"),
        ("girl's", "girl's"),
        ("ten\tred\ncars ", "10 red cars"),
    ),
)
def test_vqa_normalisation(written, same):
    metric = load("vqa_accuracy")
    assert script_of(metric)._normalize(" ".join(written.split())) == same
    for prediction, answer in ((written, same), (same, written)):
        answers = [answer] * 4 + ["something else"] * 6
        assert metric.compute(predictions=[prediction], references=[answers]) == {"accuracy": 1.0}


def test_vqa_normalises_only_where_annotators_disagree():
    metric = load("vqa_accuracy")
    for prediction, answer, accuracy in (("Black.", "black", 0.0), ("2", "two", 0.0), (" black\n", "black", 1.0)):
        assert metric.compute(predictions=[prediction], references=[[answer] * 10]) == {"accuracy": accuracy}


def test_vqa_with_too_few_answers_is_an_error():
    with pytest.raises(ValueError, match=r"Question 1 has 1 answers.*at least 4.*\[answer\] \* 10"):
        load("vqa_accuracy").compute(predictions=["yes", "no"], references=[["yes"] * 10, ["no"]])


# NLVR2


def test_nlvr2_consistency_is_over_the_pairs_of_a_sentence():
    identifiers = [
        "dev-850-0-0",  # sentence 0 of set 850: both pairs right
        "dev-850-1-0",
        "dev-850-0-1",  # sentence 1: one right, one wrong
        "dev-850-1-1",
        "dev-851-0-0",  # sentence 0 of another set: wrong
        "test1-850-0-1",  # of another split: right
    ]
    predictions, references = [1, 0, 1, 1, 0, 0], [1, 0, 1, 0, 1, 0]
    result = load("nlvr2").compute(predictions=predictions, references=references, identifiers=identifiers)
    assert result == {"accuracy": pytest.approx(4 / 6), "consistency": pytest.approx(2 / 4)}
    assert load("nlvr2").compute(predictions=predictions, references=references) == {"accuracy": pytest.approx(4 / 6)}


@pytest.mark.parametrize(
    "predictions, identifiers, message",
    (
        ([1, 2], None, "prediction 2: expected 1"),
        ([1, 0], ["dev-1-0-0"], "1 identifiers for 2 predictions"),
        ([1, 0], ["dev-1-0-0", "dev-1-0-0"], "identifiers has one of them twice"),
        ([1, 0], ["dev-1-0-0", "dev-1-0"], "'dev-1-0' is not of the form split-set-pair-sentence"),
    ),
)
def test_nlvr2_errors(predictions, identifiers, message):
    with pytest.raises(ValueError, match=message):
        load("nlvr2").compute(predictions=predictions, references=[1, 1], identifiers=identifiers)


# retrieval


def test_recall_by_hand_with_several_captions():
    # Image 0 has texts 0 and 1, image 1 texts 2 and 3, image 2 texts 4 to 6.
    scores = [
        [0.1, 0.9, 0.8, 0.0, 0.2, 0.3, 0.4],  # text 1 comes first
        [0.9, 0.8, 0.4, 0.1, 0.7, 0.6, 0.5],  # text 2 comes sixth
        [0.8, 0.9, 0.6, 0.2, 0.1, 0.7, 0.3],  # text 5 comes third
    ]
    # Columns: the right image comes third, first (a tie with image 2), third, second, third, first, second.
    result = load("retrieval_recall").compute(predictions=scores, references=[[0, 1], [2, 3], [4, 5, 6]])
    assert result == pytest.approx(
        {
            "image_to_text_recall@1": 1 / 3,
            "image_to_text_recall@5": 2 / 3,
            "image_to_text_recall@10": 1,
            "text_to_image_recall@1": 2 / 7,
            "text_to_image_recall@5": 1,
            "text_to_image_recall@10": 1,
            "mean_recall": (1 / 3 + 2 / 3 + 1 + 2 / 7 + 1 + 1) / 6,
        }
    )


def test_recall_with_a_matrix_of_its_own_for_each_direction():
    metric, references = load("retrieval_recall"), [[0], [1]]
    good, bad = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]
    result = metric.compute(predictions=good, references=references, text_to_image=np.array(bad))
    assert (result["image_to_text_recall@1"], result["text_to_image_recall@1"]) == (1.0, 0.0)
    result = metric.compute(predictions=bad, references=references, text_to_image=good)
    assert (result["image_to_text_recall@1"], result["text_to_image_recall@1"]) == (0.0, 1.0)


def test_recall_equals_that_of_sorting():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 12, (20, 60)).astype(np.float32)  # many ties
    scores[3] = -np.inf
    owner = np.concatenate([np.arange(20), rng.integers(0, 20, 40)])
    references = [np.flatnonzero(owner == image).tolist() for image in range(20)]
    result = load("retrieval_recall").compute(predictions=scores, references=references)
    for k in (1, 5, 10):
        texts = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        assert result[f"image_to_text_recall@{k}"] == np.mean([i in owner[texts[i]] for i in range(20)])
        images = np.argsort(-scores.T, axis=1, kind="stable")[:, :k]
        assert result[f"text_to_image_recall@{k}"] == np.mean([owner[t] in images[t] for t in range(60)])


def test_recall_of_constant_scores_is_chance():
    result = load("retrieval_recall").compute(predictions=np.zeros((20, 20)), references=[[i] for i in range(20)])
    assert result["image_to_text_recall@1"] == result["text_to_image_recall@1"] == 1 / 20


@pytest.mark.parametrize(
    "scores, references, message",
    (
        ([[1.0, 2.0], [3.0]], [[0], [1]], "rows of predictions have between 1 and 2 scores"),
        (
            [[1.0, 2.0], [3.0, float("nan")]],
            [[0], [1]],
            "Row 1 of predictions has a score that is missing or not a number",
        ),
        ([[1.0, 2.0], [3.0, 4.0]], [[0], [2]], "Image 1 has text 2 in references: expected indices from 0 to 1"),
        ([[1.0, 2.0], [3.0, 4.0]], [[0], [-1]], "Image 1 has text -1 in references"),
        ([[1.0, 2.0], [3.0, 4.0]], [[0, 1], []], "Image 1 has no text"),
        (
            [[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]],
            [[0], [2]],
            "1 texts belong to no image in references, the first of them 1",
        ),
    ),
)
def test_recall_errors(scores, references, message):
    with pytest.raises(ValueError, match=message):
        load("retrieval_recall").compute(predictions=scores, references=references)


def test_recall_with_a_matrix_of_the_wrong_shape_is_an_error():
    inputs = {"predictions": np.eye(2, 3), "references": [[0], [1, 2]]}
    with pytest.raises(ValueError, match=r"text_to_image has shape \(2, 3\): expected \(3, 2\)"):
        load("retrieval_recall").compute(**inputs, text_to_image=np.eye(2, 3))
    with pytest.raises(ValueError, match="rows of text_to_image have between 1 and 2 scores"):
        load("retrieval_recall").compute(**inputs, text_to_image=[[1.0], [1.0, 2.0], [3.0, 1.0]])


# captions


def captions(predictions, references, **options):
    return load("caption_metrics").compute(
        predictions=predictions, references=references, **{"tokenizer": "simple", **options}
    )


def test_bleu_by_hand():
    # All n-grams are right; four words for six: the brevity penalty is exp(1 - 6 / 4).
    result = captions(["the cat sat on"], [["The cat sat on that mat."]], metrics="bleu")
    assert list(result) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4"]
    assert list(result.values()) == pytest.approx([np.exp(-0.5)] * 4)
    # The example of the paper (Papineni et al., 2002): a word counts as often as in the reference that has it most.
    references = ["The cat is on the mat.", "There is a cat on the mat."]
    assert captions(["the the the the the the the."], [references], metrics="bleu")["bleu_1"] == pytest.approx(2 / 7)
    # Over a corpus counts are summed, not scores averaged: 4 + 1 of 4 + 2 words, 3 + 0 of 3 + 1 pairs.
    result = captions(["one two three four", "red bus"], [["one two three four"], ["red cars"]], metrics=("bleu",))
    assert result["bleu_1"] == pytest.approx(5 / 6)
    assert result["bleu_2"] == pytest.approx(np.sqrt(5 / 6 * 3 / 4))


def test_rouge_by_hand():
    # The examples of the paper (Lin, 2004): subsequences of 3 and of 2 of 4 words.
    for candidate, score in (("police kill the gunman", 3 / 4), ("the gunman kill police", 2 / 4)):
        result = captions([candidate], [["Police killed the gunman!"]], metrics="rouge")
        assert result == {"rouge_l": pytest.approx(score)}
    # Precision 1 and recall 3 / 5; of several references, the best precision and the best recall.
    expected = (1 + 1.2**2) * 1 * 0.6 / (0.6 + 1.2**2 * 1)
    assert captions(["x y z"], [["x y z v w", "v w"]], metrics="rouge")["rouge_l"] == pytest.approx(expected)


def cider_d(predictions, references):
    """CIDEr-D as Vedantam et al. (2015) write it: a mean over n of clipped cosines of tf-idf vectors, times 10."""

    def ngrams(words, n):
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    scores = []
    for prediction, captions in zip(predictions, references):
        total = 0
        for n, caption in product((1, 2, 3, 4), captions):
            having = Counter(g for group in references for g in {g for c in group for g in ngrams(c.split(), n)})
            c, s = ngrams(prediction.split(), n), ngrams(caption.split(), n)
            terms = sorted(set(c) | set(s))
            idf = np.array([np.log(len(references) / max(1, having[g])) for g in terms])
            c, s = (np.array([counts[g] for g in terms]) * idf for counts in (c, s))
            penalty = np.exp(-((len(prediction.split()) - len(caption.split())) ** 2) / (2 * 6**2))
            norm = np.linalg.norm(c) * np.linalg.norm(s)
            total += penalty * (np.minimum(c, s) @ s / norm if norm else 0) / len(captions) / 4
        scores.append(10 * total)
    return np.mean(scores)


def test_cider_equals_its_formula():
    predictions = ["a man riding a wave", "two dogs run on the beach", "the bus is the red bus on the street"]
    references = [
        ["a man on a surfboard riding a wave", "man riding a big wave in the sea"],
        ["two dogs run on the sand", "dogs on the beach", "two dogs playing"],
        ["a red bus on the street", "the bus is red"],
    ]
    result = captions(predictions, references, metrics="cider")
    assert result == {"cider": pytest.approx(cider_d(predictions, references))}
    assert 1 < result["cider"] < 9
    same = ["a man riding a big wave", "two dogs run on sand"]  # nothing in common but with themselves
    assert captions(same, [[caption] for caption in same], metrics="cider")["cider"] == pytest.approx(10)


def test_an_identical_caption_scores_full_marks(capfd):
    sentences = ["A man's dog runs, 5 times.", "Two birds sit on the red fence"]
    result = captions(sentences, [[s.upper(), "something else"] for s in sentences], metrics=("rouge", "bleu"))
    assert list(result) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"]
    assert list(result.values()) == pytest.approx([1.0] * 5)
    assert capfd.readouterr().out == ""


SPLIT = {  # as the Penn Treebank tokenizer splits and the COCO evaluation cleans
    "A man riding a wave on top of a surfboard.": "a man riding a wave on top of a surfboard",
    "Two dogs don't run; they're sleeping -- or are they?": "two dogs do n't run they 're sleeping or are they",
    "The dog's bone costs $1,000.50 or 50% off!": "the dog 's bone costs $ 1,000.50 or 50 % off",
    "a black-and-white photo, his/her cat's toys' box": "a black-and-white photo his/her cat 's toys box",
    "Caf\u00e9 \u201cquoted\u201d text\u2026 it\u2019s \u2018fine\u2019 \u2013"
    " ok": "caf\u00e9 quoted text it 's fine ok",
    "at 5:30 p.m. , o'clock & 3rd \n street...": "at 5:30 p.m. o'clock & 3rd street",
    "": "",
    ".": "",
}


def test_simple_tokenizer_splits_like_the_penn_treebanks():
    assert script_of(load("caption_metrics")).simple_tokenize(list(SPLIT)) == list(SPLIT.values())


@pytest.mark.skipif(not HAS_JAVA, reason="the Penn Treebank tokenizer needs Java")
def test_penn_treebank_tokenizer():
    sentences = [" ".join(caption.split()) for caption in SPLIT]
    assert script_of(load("caption_metrics")).ptb_tokenize(sentences) == list(SPLIT.values())


@pytest.mark.skipif(not HAS_JAVA, reason="METEOR needs Java")
@pytest.mark.filterwarnings("error")
def test_all_with_java(capfd):
    predictions, references = (
        ["a dog runs on grass", "cat", ""],
        [["A dog runs on grass."], ["dog ||| dog"], ["grass"]],
    )
    result = load("caption_metrics").compute(predictions=predictions, references=references)
    assert list(result) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider", "rouge_l", "meteor"]
    assert 0.5 < result["meteor"] < 1
    assert capfd.readouterr().out == ""


def test_without_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    predictions, references = ["the red bus", "two dogs"], [["a red bus"], ["two dogs run"]]
    with pytest.warns(UserWarning) as warned:
        result = captions(predictions, references, tokenizer="auto", metrics=("spice", "meteor", "rouge", "bleu"))
    (message,) = {str(warning.message) for warning in warned}
    for part in ("Java is not installed", "simple tokenizer", "METEOR was left out", "SPICE .* was left out"):
        assert re.search(part, message), message
    assert result == captions(predictions, references, metrics=("bleu", "rouge"))
    with pytest.raises(RuntimeError, match="does not run: Java is not installed"):
        captions(predictions, references, tokenizer="ptb")


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for java")
def test_with_a_java_that_does_not_work(monkeypatch, tmp_path):
    stub = tmp_path / "java"
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match="METEOR was left out.*the java command does not work"):
        assert captions(["a bus"], [["a bus"]], metrics="meteor") == {}
    # One that says its version and then dies: METEOR's scorer must neither raise nor hang.
    stub.write_text('#!/bin/sh\n[ "$1" = -version ]\n')
    with pytest.warns(UserWarning, match="METEOR was left out"):
        assert captions(["a bus"], [["a bus"]], metrics="meteor") == {}


@pytest.mark.filterwarnings("error")
def test_without_java_nothing_is_said_where_it_is_not_needed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert captions(["a bus"], [["a bus"]], metrics=("rouge",)) == {"rouge_l": 1.0}


def test_spice_without_its_models(monkeypatch, capfd):
    metric = load("caption_metrics")
    spice = pytest.importorskip("pycocoevalcap.spice.spice")

    def no_network():
        print("Downloading")
        os.system("echo Downloading")
        raise OSError("no network")

    monkeypatch.setattr(spice, "get_stanford_models", no_network)
    monkeypatch.setattr(script_of(metric), "java_problem", lambda: None)
    inputs = {"predictions": ["a bus"], "references": [["a bus"]], "tokenizer": "simple"}
    with pytest.warns(UserWarning, match=r"SPICE .* was left out \[OSError: no network\]"):
        assert list(metric.compute(**inputs, metrics=("spice", "rouge"))) == ["rouge_l"]
    print("still here")
    assert capfd.readouterr().out == "still here\n"


@pytest.mark.parametrize(
    "inputs, message",
    (
        ({"metrics": ("bleu", "bleurt")}, "metrics has 'bleurt': expected some of bleu, cider"),
        ({"tokenizer": "ptb2"}, "tokenizer='ptb2': expected one of auto, ptb, simple"),
        ({"references": [[]]}, "Image 0 has no reference caption"),
        ({"references": [["?!", ""]]}, "No reference caption has a word"),
    ),
)
def test_caption_errors(inputs, message):
    with pytest.raises(ValueError, match=message):
        captions(**{"predictions": ["a bus"], "references": [["a bus"]], **inputs})


def test_a_missing_pycocoevalcap_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(ImportError, match="pip install 'madtp_hf"):
        load_metric("caption_metrics")
