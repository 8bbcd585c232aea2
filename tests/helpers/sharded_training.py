"""Train a few steps with parameters sharded over two processes by torch's `fully_shard` (FSDP2), layer by layer.

`tests/test_sharded_training.py` runs it under torchrun with two processes, calls its functions with one, and compares.
It doesn't use `Trainer(fsdp=True)`: on CPUs accelerate ignores that and trains with copies of the model (DDP).
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ..conftest import TASKS, make_task_model


STEPS = 3
# Without retrieval: its negatives come from all processes, so its loss is not the mean of the processes' losses.
TASK_NAMES = ("vqa", "captioning", "nlvr2")


def make_batches(task):
    batches = [TASKS[task].make_inputs((8,) * 8, seed=seed) for seed in range(STEPS)]
    for batch in batches:
        # Vary the lengths of texts, but not of answers and captions, whose means over tokens are averaged.
        batch["attention_mask"][::3, 5:] = 0
    return batches


def train(task, processes: int, rank: int = 0) -> dict:
    """Train and return the values to compare."""
    model = make_task_model(task, {"alignment_dim": 8})
    if processes > 1:
        mesh = init_device_mesh("cpu", (processes,))
        # Don't shard the embeddings: the decoder's output weights, outside of them, are tied to the word embeddings.
        names = set(model._no_split_modules) - {"BlipTextEmbeddings"}
        layers = [module for module in model.modules() if type(module).__name__ in names]
        for module in (*layers, model):
            fully_shard(module, mesh=mesh)
        assert len(layers) > 5 and all(isinstance(parameter, DTensor) for parameter in model.parameters())
    model.train()
    model.set_pruning(temperature=1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses, tokens = [], []
    for batch in make_batches(task):
        output = model(**{name: value.chunk(processes)[rank] for name, value in batch.items()})
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss, left = output.loss.detach().clone(), output.vision_tokens[-1].float().mean()
        if processes > 1:
            for value in (loss, left):
                dist.all_reduce(value)
                value /= processes
        losses.append(loss.item())
        tokens.append(left.item())
    weights = (
        get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if processes > 1
        else model.state_dict()
    )
    return {"losses": losses, "vision_tokens": tokens, "weights": weights}


def main(folder: Path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {task: train(task, 2, dist.get_rank()) for task in TASK_NAMES}
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
