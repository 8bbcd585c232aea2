"""Parameters sharded over two processes learn what one process learns; see `helpers/sharded_training.py`."""

import pytest
import torch

from .helpers import sharded_training as sharded
from .test_distributed import close, torchrun


pytestmark = pytest.mark.slow  # distributed training without shards is in test_distributed.py


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    torchrun("tests.helpers.sharded_training", folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("task", sharded.TASK_NAMES)
def test_two_processes_learn_what_one_learns(ranks, task):
    expected, (first, second) = sharded.train(task, 1), (rank[task] for rank in ranks)
    for got in (first, second):
        assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert got["vision_tokens"] == expected["vision_tokens"]
        assert max(got["vision_tokens"]) < 37  # of so many
        close(got["weights"], expected["weights"], rtol=0, atol=1e-5)
