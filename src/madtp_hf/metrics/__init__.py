"""The metrics of the four tasks, as modules of the `evaluate` library: one folder each, loadable offline by path.

The scripts are self-contained, because `evaluate` copies a script to its cache (again whenever the code changes) and
imports it from there.
"""

from pathlib import Path


METRICS = ("caption_metrics", "nlvr2", "retrieval_recall", "vqa_accuracy")


def load_metric(name: str, **kwargs):
    """Load one of this package's metrics by name as an `evaluate.EvaluationModule`, from disk, without a network.

    Args:
        name (`str`): One of `METRICS`.
        **kwargs:
            Passed to `evaluate.load`. `keep_in_memory` is on unless given or evaluation is distributed (`num_process`
            above 1), so that metrics loaded in several processes share no file. Distributed evaluation needs files:
            give all processes the same `experiment_id`, different from those of other runs.

    Raises:
        ValueError: if there is no such metric.
        ImportError: if `evaluate` is not installed.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}: expected one of {', '.join(METRICS)}.")
    try:
        import evaluate
    except ImportError as error:
        raise ImportError("The metrics need evaluate: pip install 'madtp_hf[metrics]'.") from error
    kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
    return evaluate.load(str(Path(__file__).parent / name), **kwargs)
