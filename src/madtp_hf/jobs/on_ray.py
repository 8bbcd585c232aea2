"""Run a job's batches on a Ray cluster with Ray Data; the process that began the job saves the results."""

import os
from collections.abc import Iterator

from ..data.sources import require


class _Read:
    def __init__(self, reader):
        self.reader = reader

    def __call__(self, row: dict) -> dict:
        return {"batch": self.reader[row["rows"]]}


class _Compute:
    """Computes with a model that stays in an actor."""

    def __init__(self, load):
        self.worker = load()

    def __call__(self, row: dict) -> dict:
        batch, values = row["batch"], self.worker(row["batch"])
        batch.pixels = None
        return {"done": (batch, values)}


def run_on_ray(reader, worker, batches: list, models: int) -> Iterator[tuple]:
    """Yield each batch with the results of its usable rows, in any order.

    models: how many copies of the model to run, each with a GPU if the cluster has any; 0 is one for each GPU. The
    cluster is that of `RAY_ADDRESS`, by default one on this machine. All machines must see the model and the images
    under the same paths.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = require("ray")
    if worker.load_again is None:
        raise ValueError("Ray loads the model in other processes: expected a worker made by `Worker.load`.")
    if not batches:
        return
    began = not ray.is_initialized()
    if began:
        here = (
            {}
            if os.environ.get("RAY_ADDRESS")
            else {"num_cpus": 2 * max(1, models), "object_store_memory": 512 * 2**20}
        )
        ray.init(include_dashboard=False, log_to_driver=False, **here)
    try:
        data = require("ray.data")
        data.DataContext.get_current().enable_progress_bars = False
        gpus = int(ray.cluster_resources().get("GPU", 0))
        models = models or max(1, gpus)
        actors = {"compute": data.ActorPoolStrategy(size=models)}
        done = (
            data.from_items(
                [{"rows": rows.tolist()} for rows in batches], override_num_blocks=min(len(batches), 16 * models)
            )
            .map(_Read, fn_constructor_args=(reader,), num_cpus=0.5, **actors)
            .map(_Compute, fn_constructor_args=(worker.load_again,), num_cpus=0.5, num_gpus=min(1, gpus), **actors)
        )
        for row in done.iter_rows():
            yield row["done"]
    finally:
        if began:
            ray.shutdown()
