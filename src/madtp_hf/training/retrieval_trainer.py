"""Train image-text retrieval as in BLIP, contrasting with a momentum encoder's features of this and earlier batches.

The momentum (EMA) encoder and its feature queues stay out of the published checkpoint: the trained model is a plain
`MadtpBlipForImageTextRetrieval` or `MadtpClipModel`.
"""

import copy
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer

from ..modeling.modeling_madtp_blip import MadtpBlipForImageTextRetrieval
from ..modeling.modeling_madtp_clip import MadtpClipModel
from ..modeling.retrieval_loss import TEMPERATURE, ContrastiveKeys, gather_rows, is_distributed, same_image_targets


MEMORY_FILE = "contrastive_memory.safetensors"


class ContrastiveMemory(nn.Module):
    """A momentum (EMA) encoder of a retrieval model, queues of its features, and BLIP's learned temperature.

    The temperature scales the similarities; CLIP has a `logit_scale` of its own instead.

    Args:
        model (`MadtpBlipForImageTextRetrieval` or `MadtpClipModel`):
            The model; the momentum encoder starts as its copy.
        queue_size (`int`):
            The number of image and text features of earlier batches to contrast with.
        momentum (`float`):
            The share of the momentum encoder that is kept at a step; the rest comes from the model.
        distillation (`float`):
            The largest share of the momentum encoder's own similarities in the targets; the rest is which image
            belongs to which text.
    """

    image_queue: torch.Tensor
    text_queue: torch.Tensor
    id_queue: torch.Tensor
    position: torch.Tensor

    def __init__(self, model, queue_size: int = 57600, momentum: float = 0.995, distillation: float = 0.4):
        super().__init__()
        if queue_size < 0:
            raise ValueError(f"queue_size={queue_size}: expected at least 0.")
        if not 0 <= momentum < 1 or not 0 <= distillation <= 1:
            raise ValueError(f"{momentum=}, {distillation=}: expected momentum in [0, 1), distillation in [0, 1].")
        self.momentum = momentum
        self.distillation = distillation
        # Always float32: half precision would round away the small steps of a slow average.
        self.momentum_encoder = copy.deepcopy(model).float().requires_grad_(False).eval()
        if is_distributed():  # as the model's wrapper does: new parameters are random, and differ between processes
            for parameter in self.momentum_encoder.parameters():
                dist.broadcast(parameter, 0)
        self.has_temperature = not isinstance(model, MadtpClipModel)
        if self.has_temperature:
            self.temperature = nn.Parameter(torch.tensor(TEMPERATURE, device=model.device))
        config = model.config
        width = config.image_text_hidden_size if self.has_temperature else config.projection_dim
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, torch.zeros(queue_size, width, device=model.device))
        # -1 marks places of the queue that are not filled yet; no image has this id.
        self.register_buffer("id_queue", torch.full((queue_size,), -1, dtype=torch.long, device=model.device))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def follow(self, model) -> None:
        """Update the momentum encoder from the model, once per step."""
        for mine, theirs in zip(self.momentum_encoder.parameters(), model.parameters()):
            mine.lerp_(theirs.to(mine.dtype), 1 - self.momentum)
        if not self.has_temperature:  # scale similarities as the model does
            self.momentum_encoder.logit_scale.copy_(model.logit_scale)
        # Prune as the model does.
        self.momentum_encoder.config.pruning_setting = model.config.pruning_setting

    @torch.no_grad()
    def _enqueue(self, image: torch.Tensor, text: torch.Tensor, ids: torch.Tensor) -> None:
        size = len(self.id_queue)
        if size == 0:
            return
        image, text, ids = image[-size:], text[-size:], ids[-size:]
        places = (self.position.to(ids.device) + torch.arange(len(ids), device=ids.device)) % size
        self.image_queue[places] = image.to(self.image_queue.dtype)
        self.text_queue[places] = text.to(self.text_queue.dtype)
        self.id_queue[places] = ids
        self.position = (self.position + len(ids)) % size

    def forward(self, inputs: dict[str, torch.Tensor], progress: float) -> ContrastiveKeys:
        """Return the keys and targets that this batch is contrasted with, then add its features to the queues.

        progress, in [0, 1]: how far distillation has been faded in.
        """
        with torch.no_grad():
            if self.has_temperature:
                self.temperature.clamp_(0.001, 0.5)
            temperature = self.temperature if self.has_temperature else (-self.momentum_encoder.logit_scale).exp()
            encoder = self.momentum_encoder
            outputs = (
                encoder.get_image_features(inputs["pixel_values"]),
                encoder.get_text_features(inputs["input_ids"], inputs.get("attention_mask")),
            )
            image, text = (F.normalize(output.pooler_output, dim=-1) for output in outputs)
            ids = inputs["image_ids"]
            everyone = [gather_rows(rows) for rows in (image, text, ids)]
            filled = self.id_queue >= 0
            queues = (self.image_queue[filled], self.text_queue[filled], self.id_queue[filled])
            image_keys, text_keys, key_ids = (torch.cat([new, old]) for new, old in zip(everyone, queues))

            targets = same_image_targets(ids, key_ids)
            share = self.distillation * progress

            def soften(feature, keys):
                return share * (feature @ keys.T / temperature).softmax(dim=1) + (1 - share) * targets

            image_targets, text_targets = soften(image, text_keys), soften(text, image_keys)
            self._enqueue(*everyone)
        learned = self.temperature if self.has_temperature else None
        return ContrastiveKeys(image_keys, text_keys, image_targets, text_targets, learned)


class RetrievalTrainer(Trainer):
    """A `Trainer` for `MadtpBlipForImageTextRetrieval` or `MadtpClipModel` with a `ContrastiveMemory`.

    It takes the batches of `RetrievalCollator`. Queues and hard negatives span all processes, whose batches must have
    equal sizes (`dataloader_drop_last` is switched on). A training checkpoint holds the memory beside the model, so
    that training can resume.

    Args:
        queue_size (`int`, *optional*, defaults to 57600), momentum (`float`, *optional*, defaults to 0.995),
            distillation (`float`, *optional*, defaults to 0.4):
            See `ContrastiveMemory`; the defaults are BLIP's for COCO. The queue must be small relative to the data
            set; otherwise its features are stale and its positives outnumber the batch's.
        distillation_warmup_steps (`int`, *optional*):
            The number of steps over which distillation is faded in; by default two epochs, as in BLIP.
        kwargs:
            `Trainer`'s arguments.
    """

    memory: ContrastiveMemory
    distillation_warmup_steps: int | None
    _begins_step: bool

    def __init__(
        self,
        *args,
        queue_size: int = 57600,
        momentum: float = 0.995,
        distillation: float = 0.4,
        distillation_warmup_steps: int | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if self.model_init is not None:
            raise ValueError(
                "RetrievalTrainer got a model_init: expected a model, from which its momentum encoder starts."
            )
        if not isinstance(self.model, (MadtpBlipForImageTextRetrieval, MadtpClipModel)):
            raise TypeError(
                f"RetrievalTrainer got a {type(self.model).__name__}: expected a MadtpBlipForImageTextRetrieval or a"
                " MadtpClipModel."
            )
        self.args.dataloader_drop_last = True
        self.memory = ContrastiveMemory(self.model.to(self.args.device), queue_size, momentum, distillation)
        self.distillation_warmup_steps = distillation_warmup_steps
        self._begins_step = True
        if self.lr_scheduler is not None:
            raise ValueError(
                "RetrievalTrainer got a scheduler, which lacks the learned temperature that is added to the optimizer:"
                " expected optimizers=(optimizer, None), and the schedule's settings in the training arguments."
            )
        self._add_temperature(self.optimizer)

    def _add_temperature(self, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is not None and self.memory.has_temperature:
            optimizer.add_param_group({"params": [self.memory.temperature], "weight_decay": 0.0})

    def create_optimizer(self, *args, **kwargs):
        made = self.optimizer is None
        super().create_optimizer(*args, **kwargs)
        if made:
            self._add_temperature(self.optimizer)
        return self.optimizer

    def _distillation_progress(self) -> float:
        steps: float | None = self.distillation_warmup_steps
        if steps is None:
            steps = 2 * self.state.max_steps / max(self.state.num_train_epochs or 1, 1)
        return min(self.state.global_step / max(steps, 1), 1.0)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            with self.accelerator.autocast():
                inputs["contrastive_keys"] = self.memory(inputs, self._distillation_progress())
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args, **kwargs):
        if self._begins_step:
            self.memory.follow(self.model)
            if self.memory.has_temperature:
                self.memory.temperature.grad = None  # `Trainer` only clears the gradients of its model
        loss = super().training_step(*args, **kwargs)
        self._begins_step = self.accelerator.sync_gradients
        # The model's wrapper averages the model's gradients over processes; the temperature is not part of the model.
        if self.memory.has_temperature and is_distributed() and self.accelerator.sync_gradients:
            gradient = self.memory.temperature.grad
            assert gradient is not None  # the loss depends on the temperature
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        return loss

    def _save_checkpoint(self, *args, **kwargs):
        # Save the memory first: `trainer_state.json`, which marks a complete checkpoint, is written last.
        if self.args.should_save:
            folder = os.path.join(self._get_output_dir(trial=None), f"checkpoint-{self.state.global_step}")
            os.makedirs(folder, exist_ok=True)
            save_file(
                {name: tensor.contiguous() for name, tensor in self.memory.state_dict().items()},
                os.path.join(folder, MEMORY_FILE),
            )
        super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, *args, **kwargs):
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        self.memory.load_state_dict(load_file(os.path.join(resume_from_checkpoint, MEMORY_FILE)))
