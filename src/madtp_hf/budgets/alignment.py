"""Fit alignment tokens to data without training: a start that loses less accuracy than random tokens.

The importance of an image token is s = (s_self + s_cls + s_tok) / 3; only s_tok depends on the alignment tokens. It
should equal what the model attends to in an image,

    q = (s_cls + s_cross) / 2,    s_cross: a patch's share of the text's cross-attention, over layers, heads and words,

which needs s_tok = r = 3 q - s_self - s_cls. The tokens are fitted to a part of that, s_tok = (1 - TILT) / N + TILT r:
a larger part would leave so few patches above the threshold that patches of medium importance are dropped even at
small reductions. All words of a text should be equally important, s_tok = 1 / N.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..modeling.pruning_method import Decision, PruningMethod
from ..modeling.token_pruning import pooling_importance, sum_over_tokens
from ..tasks import TASKS
from .passes import complete, encode, restored


MAX_WORDS = 20_000  # word states over all layers; more of them don't move the cluster centres
MAX_IMAGES = 128
MAX_NUMBERS = 2**27  # elements of those images' patch states over all layers: half a gigabyte in float32
CENTRE_ITERATIONS = 15
FIT_STEPS = 150
ROWS_OF_A_STEP = 2**14  # patches in an optimizer step
WORDS_OF_A_STEP = 512
TILT = 0.25  # the best of 0.25, 0.5 and 1 on the validation split of the digit scenes
LARGEST_SHARE = 5.0  # cap, relative to the mean: without it, a single patch could dominate the loss


class _Recorder(PruningMethod):
    """Keep all tokens and record what each layer sees.

    states[layer]: the layer's input (R, D) and its `Sequences`; attention[layer]: a list of (s_self, s_cls), each (B,
    N), one entry for each chunk of the batch with sequences of one length.
    recorders: by modality, the recorders of the forward passes.
    """

    has_fixed_counts = True
    recorders: dict[str, list]

    def __init__(self, spec):
        self.spec, self.states, self.attention = spec, {}, defaultdict(list)

    @classmethod
    def for_branch(cls, model, pruning, modality, with_feature):
        cls.recorders[modality].append(cls(model.branch_specs[modality]))
        return cls.recorders[modality][-1]

    def prunes(self, layer, sequences):
        return self.spec.num_removable(sequences) > 0

    def read_input(self, layer, states, sequences):
        self.states[layer] = states, sequences
        return None, None

    def decide(self, layer, statistics, scores, chunk):
        received = statistics.received / sum_over_tokens(statistics.received)
        self.attention[layer].append((received, pooling_importance(statistics)))
        mask = self.spec.mask(chunk)
        stays = torch.ones_like(received, dtype=torch.bool) if mask is None else mask
        return Decision(torch.zeros_like(received), stays, torch.zeros_like(stays[:, :1]))

    def removable_states(self, layer) -> torch.Tensor:
        """Return the states (R', D) of the tokens that pruning may remove."""
        states, sequences = self.states[layer]
        tokens, mask = sequences.pad(states)[:, self.spec.removable(sequences)], self.spec.mask(sequences)
        return tokens.flatten(0, 1) if mask is None else tokens[mask]


class _Recording:
    """Record states and attention of both branches in forward passes that keep every token.

    patches: states (layers, b, N, D); attention: s_self and s_cls (layers, 2, b, N); cross: s_cross (b, N). Each is a
    list with one entry per batch. words: for each layer, a list of states (n, D).
    """

    def __init__(self, model):
        self.model, self.task = model, TASKS[model.task]
        self.patches, self.attention, self.cross, self.words = [], [], [], defaultdict(list)
        self.num_images = self.num_words = 0
        self._recorders: dict[str, list[_Recorder]] = {"vision": [], "text": []}
        self._shares, self._query = defaultdict(list), None

    def _hook_cross_attention(self) -> list:
        """Hook the query and key projections of the text's cross-attention to images, and return the hooks.

        NLVR2's text encoder has two cross-attention modules in each layer.
        """
        hooks = []
        encoder = getattr(self.model, self.task.text_encoder).encoder if self.task.text_encoder else None
        for index, layer in enumerate(getattr(encoder, "layer", ())):  # CLIP's layers have no cross-attention
            cross = getattr(layer, "crossattention", None)
            places = [module for module in cross.modules() if hasattr(module, "query")] if cross is not None else []
            for place, module in enumerate(places):
                hooks.append(module.query.register_forward_hook(self._keep_query))
                hooks.append(
                    module.key.register_forward_hook(self._share_of(index, place, module.num_attention_heads))
                )
        return hooks

    def _keep_query(self, module, inputs, query):
        self._query = query

    def _share_of(self, layer: int, place: int, num_heads: int):
        spec = self.model.branch_specs["vision"]

        def add(module, inputs, key):
            sequences = self._recorders["text"][-1].states[layer][1]
            query = sequences.pad(self._query).unflatten(-1, (num_heads, -1)).transpose(1, 2).float()
            key = key.unflatten(0, (sequences.batch_size, -1)).unflatten(-1, (num_heads, -1)).transpose(1, 2).float()
            attention = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1)
            if sequences.mask is not None:
                attention = attention * sequences.mask[:, None, :, None]
            removable = slice(spec.num_prefix_tokens, attention.shape[-1] - spec.num_suffix_tokens)
            received = attention[..., removable].sum(dim=(1, 2))
            self._shares[place].append(received / sum_over_tokens(received))

        return add

    def run(self, dataloader) -> None:
        """Run batches through the model until enough has been recorded."""
        recorder = type("_ThisRecorder", (_Recorder,), {"recorders": self._recorders})
        hooks = self._hook_cross_attention()
        try:
            with restored(self.model), self.model.pruning(method=recorder, keep_rate=0.5):
                for batch in dataloader:
                    encode(self.model, complete(self.model, batch))
                    self._take()
                    if self._has_enough():
                        break
        finally:
            for hook in hooks:
                hook.remove()

    def _take(self) -> None:
        """Store what the forward pass of the last batch recorded."""
        vision, texts = self._recorders["vision"][0], self._recorders["text"]
        for text in texts:
            for layer in text.states:
                self.words[layer].append(text.removable_states(layer))
                self.num_words += len(self.words[layer][-1])
        if vision.states and not self._has_images():
            states, sequences = vision.states[0]
            room = min(MAX_IMAGES, MAX_NUMBERS // (states[0].numel() * sequences.max_seqlen * len(vision.states)))
            number = max(room - self.num_images, 1)
            layers = sorted(vision.states)
            padded = torch.stack([sequences.pad(vision.states[layer][0])[:number] for layer in layers])
            self.patches.append(padded[:, :, vision.spec.removable(sequences)])
            parts = [[torch.stack(part) for part in vision.attention[layer]] for layer in layers]
            self.attention.append(torch.stack([torch.cat(layer, dim=1)[:, :number] for layer in parts]))
            if self._shares:
                shares = [torch.stack(of_place).mean(dim=0) for of_place in self._shares.values()]
                self.cross.append(torch.stack(shares, dim=1).flatten(0, 1)[:number])
            self.num_images += self.patches[-1].shape[1]
            self._room = room
        for recorders in self._recorders.values():
            recorders.clear()
        self._shares.clear()

    def _has_images(self) -> bool:
        return self.num_images > 0 and self.num_images >= self._room

    def _has_enough(self) -> bool:
        return self._has_images() and (self.num_words >= MAX_WORDS or not self.words)

    def target(self) -> torch.Tensor:
        """Return what s_tok of the patches should be proportional to, (layers, B, N), with mean 1 over patches."""
        by_self, by_class = torch.cat(self.attention, dim=2).unbind(1)
        by_class = by_class / sum_over_tokens(by_class)
        read = (by_class + torch.cat(self.cross)) / 2 if self.cross else by_class
        missing = (3 * read - by_self - by_class).clamp(min=0)
        missing = (missing / missing.mean(dim=-1, keepdim=True).clamp(min=1e-8)).clamp(max=LARGEST_SHARE)
        return 1 - TILT + TILT * missing / missing.mean(dim=-1, keepdim=True).clamp(min=1e-8)


def _centres(states: torch.Tensor, number: int) -> torch.Tensor:
    """Compute cluster centres (number, D) of states (n, D): k-means with farthest-point initialisation."""
    first = (states - states.mean(dim=0)).norm(dim=1).argmax()
    chosen = [states[first]]
    distance = (states - chosen[0]).pow(2).sum(dim=1)
    for _ in range(number - 1):
        chosen.append(states[distance.argmax()])
        distance = torch.minimum(distance, (states - chosen[-1]).pow(2).sum(dim=1))
    centres = torch.stack(chosen)
    for _ in range(CENTRE_ITERATIONS):
        nearest = torch.cdist(states, centres).argmin(dim=1)
        sizes = torch.bincount(nearest, minlength=number).to(states).unsqueeze(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, states)
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return centres


def _thinned(states: torch.Tensor) -> torch.Tensor:
    """Return at most MAX_WORDS of the states (n, D), evenly spaced."""
    return states[:: -(-len(states) // MAX_WORDS)]


def _projected(projection, layer: int, states: torch.Tensor) -> torch.Tensor:
    """Project a layer's states (..., D) to the space of the alignment tokens (T, E): (..., E) in float32."""
    projection = projection[layer] if isinstance(projection, nn.ModuleList) else projection
    return (states if projection is None else projection(states)).float()


def _miss(strongest: torch.Tensor, target) -> torch.Tensor:
    """Return the mean squared error between scores (..., N), scaled to mean magnitude 1, and the target."""
    return (strongest / strongest.abs().mean(dim=-1, keepdim=True) - target).pow(2).mean()


def _fit(
    tokens: torch.Tensor, patches: torch.Tensor, target: torch.Tensor, words: torch.Tensor | None
) -> torch.Tensor:
    """Fit alignment tokens (T, E), from `tokens` on: a patch's largest score becomes proportional to its target.

    patches (B, N, E), of all layers; target (B, N); words (n, E), which all have the same target.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(number, of):
        return torch.randperm(of, generator=generator)[:number].to(tokens.device)

    # Scores are normalised, so the scale of the alignment tokens is free; the learning rate assumes norm 1.
    tokens = (tokens / tokens.norm(dim=1).mean()).requires_grad_(True)
    optimizer = torch.optim.Adam([tokens], lr=0.4 * tokens.shape[1] ** -0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT_STEPS)
    for _ in range(FIT_STEPS):
        chosen = draw(max(8, ROWS_OF_A_STEP // patches.shape[1]), len(patches))
        loss = _miss((patches[chosen] @ tokens.T).amax(dim=-1), target[chosen])
        if words is not None:
            loss = loss + _miss((words[draw(WORDS_OF_A_STEP, len(words))] @ tokens.T).amax(dim=-1), 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return tokens.detach()


@torch.no_grad()
def init_alignment_from(model, dataloader: Iterable[Mapping]) -> None:
    """Replace a model's alignment tokens by tokens fitted to data, in seconds; the same data gives the same tokens.

    The tokens start as cluster centres of the word states, or of the patch states for a model without a text encoder.
    They are then fitted on some images so that the importance of a patch approximates the attention that the class
    token and the text pay it. The rest of the model is not trained, and no labels are needed. Calibrate afterwards: an
    existing schedule is dropped, because it belongs to the old tokens, and pruning is switched off.

    Args:
        model (`MadtpBlipPreTrainedModel` or `MadtpClipModel`): The model. One that was trained with pruning loses its
            learned alignment tokens.
        dataloader (`Iterable`): Batches as `forward` takes them, dicts of tensors. A few hundred samples are enough:
            reading stops after 128 images, or as many as fit into half a gigabyte, and about 20,000 word states.

    Raises:
        ValueError: if the data has no batch, or no words for a model with a text encoder.

    Example:

        model = MadtpBlipForQuestionAnswering.from_blip("Salesforce/blip-vqa-base")
        init_alignment_from(model, dataloader)
        calibrate(model, dataloader, [0.3, 0.5])
    """
    recording = _Recording(model)
    recording.run(dataloader)
    if not recording.num_images:
        raise ValueError("dataloader yields no image with several patches: expected batches as the model takes them.")
    if recording.task.text_encoder is not None and not recording.num_words:
        raise ValueError("dataloader yields no text with more than its first token: expected texts with words.")
    alignment = model.alignment
    patches = torch.cat(recording.patches, dim=1)
    patches = torch.stack([_projected(alignment.vision_projection, layer, x) for layer, x in enumerate(patches)])
    of_layers = [
        _projected(alignment.text_projection, layer, torch.cat(recording.words[layer]))
        for layer in sorted(recording.words)
    ]
    words = _thinned(torch.cat(of_layers)) if of_layers else None
    patches, target = patches.flatten(0, 1), recording.target().flatten(0, 1)
    start = _centres(_thinned(patches.flatten(0, 1)) if words is None else words, len(alignment.tokens))
    with torch.enable_grad():
        tokens = _fit(start, patches, target, words)
    alignment.tokens.copy_(tokens)
    model.config.pruning_schedule = model.config.pruning_token_counts = None
    model.set_pruning(None)
