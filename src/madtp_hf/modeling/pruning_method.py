"""What a pruning method is: what it needs of attention, its decision for a layer, its path of settings, and its cost.

A method is a class with a `name`, in a file of its own; a branch of one forward pass is pruned by one object of it.

Shapes: R rows of all sequences; in a chunk of the batch, n sequences of up to L tokens, N of which are removable; T
alignment tokens, D width of the branch, H heads, d head width.
"""

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch

from .attention import BranchSpec, attend_fused, attend_with_statistics, in_kernels, takes_kernels
from .chunks import Chunking, divide, whole
from .sequences import Sequences


class Decision(NamedTuple):
    """A method's answer for a layer: which tokens stay, where each of the others goes, and with what weight.

    Methods answer for each chunk of the batch:

    weight (n, N): the weight of each removed token in the token that it is merged into; 0 at tokens that stay and at
        padding.
    stays (n, N) bool: True at the tokens that stay, False at padding.
    merges (n, 1) bool: the sequences that get a merged token, placed after the removable tokens that stay.
    into (n, N) int64, optional: the removable token that each removed token is merged into, instead of a new token.
        The staying token's own weight is 1 minus the weights that are merged into it.
    length: the number of rows of each sequence, if it is fixed; sequences that need fewer rows are padded.
    sizes (n, N), optional, with `into`: how many tokens each token that stays counts as. Later layers weight each key
        by its size (proportional attention).

    Triton's gate answers for each row of a varlen batch:

    weight (R,): each row's importance; without `sizes`, removed rows are weighted by their share of it.
    destination (R,) int32: for a row that stays, its position among its sequence's new rows; for a row that goes, -1 -
        the position of the row that it is merged into.
    sizes (R,), optional, if rows are merged into rows that stay: a row's size or, if it goes, as how many tokens it
        counts in the row that it is merged into.
    cu_seqlens (B + 1,) int32: where each sequence's new rows begin and end.
    """

    weight: torch.Tensor
    stays: torch.Tensor | None = None
    merges: torch.Tensor | None = None
    into: torch.Tensor | None = None
    length: int | None = None
    destination: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    sizes: torch.Tensor | None = None


class Attended(NamedTuple):
    """Self-attention's output (R, H * d) and, if the layer prunes, the decision for each chunk of the batch."""

    output: torch.Tensor
    chunking: Chunking | None = None
    decisions: list[Decision] | None = None


class Field(NamedTuple):
    """One number of a method's setting: its bounds, and its default; without one it has to be given."""

    lowest: float
    highest: float
    default: float | None = None


class Path(NamedTuple):
    """A method's settings as a line of points, from no pruning to most.

    points: what `calibrate` measures first; the first and the last bound the path.
    setting: the setting at a point. point: the point of a setting.
    moderate: a point to start training from.
    start: a number that gives the same path again, for methods whose path depends on the model.
    """

    points: tuple[float, ...]
    setting: Callable[[float], dict[str, float]]
    point: Callable[[dict[str, float]], float]
    moderate: float
    start: float | None = None


METHODS: dict[str, type["PruningMethod"]] = {}
WITH_STATISTICS = ("statistics", "statistics_and_keys")  # what a method needs if attention has to compute its maps


def get_method(name: str) -> type["PruningMethod"]:
    """Return the pruning method of this name.

    Raises:
        ValueError: if there is none.
    """
    if name not in METHODS:
        raise ValueError(
            f"pruning_method={name!r}: expected one of {', '.join(sorted(METHODS))}, or the name of a class of your"
            " own. Import the file that defines it first, or load the checkpoint that carries it with"
            " trust_remote_code=True."
        )
    return METHODS[name]


class PruningMethod:
    """The base class of pruning methods. A subclass with a `name` is registered under it.

    A method implements `decide`, and says how much it prunes by `fields`, `prunes` and, unless its setting is one
    number, `path`. An object serves one branch in a single forward pass, so it may carry state from layer to
    layer. It must store that state by layer number, because gradient checkpointing runs a layer twice.

    Attributes:
        name: what `config.pruning_method` is set to.
        fields: the numbers of a setting. The first one says how much to prune.
        off: the first number's value that prunes nothing.
        modalities: the branches that the method has an answer for.
        needs: what `decide` gets from self-attention: `"statistics"`, an `AttentionStatistics`;
            `"statistics_and_keys"`, one with keys; `"pooling_attention"`, (n, N), the pooling query's attention, its
            mean over heads; `"keys"`, (n, N, d), their mean over heads; or None. All but the first two leave attention
            fused.
        has_fixed_counts: whether the number of tokens that a layer leaves depends on shapes and the setting alone.
        importance_is_aligned: whether importance depends on the alignment tokens, so that it pays to fit them to data.
        with_feature: whether the loss needs each layer's alignment feature.
    """

    name: ClassVar[str | None] = None
    fields: ClassVar[dict[str, Field]] = {"keep_rate": Field(0, 1)}
    off: ClassVar[float] = 1.0
    modalities: ClassVar[tuple[str, ...]] = ("vision", "text")
    needs: ClassVar[str | None] = "statistics"
    has_fixed_counts: ClassVar[bool] = False
    importance_is_aligned: ClassVar[bool] = False
    with_feature = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "attention_bias"):  # of versions before 0.3.0; without it, attention would silently change
            raise TypeError(f"{cls.__name__}.attention_bias is never called: return the sizes in `Decision.sizes`.")
        if cls.__dict__.get("name"):
            METHODS[cls.name] = cls

    def __init__(self, spec: BranchSpec, setting: dict[str, float], num_layers: int):
        self.spec, self.setting, self.num_layers = spec, setting, num_layers

    @classmethod
    def for_branch(cls, model, pruning, modality: str, with_feature: bool) -> "PruningMethod | None":
        """Create the method of a branch for one forward pass; None leaves the branch dense.

        model: a `PrunedModelMixin`; pruning: its `PruningPass`; with_feature: whether the loss needs an alignment
        feature.
        """
        if not pruning.prunes(modality):
            return None
        branch = getattr(model.config, f"{modality}_config")
        return cls(model.branch_specs[modality], pruning.setting, branch.num_hidden_layers)

    # A setting

    @classmethod
    def read_setting(cls, given: dict[str, float | None]) -> dict[str, float] | None:
        """Check a setting and fill in its defaults; return None if it prunes nothing.

        Raises:
            ValueError: if a number is unknown, missing or out of bounds.
        """
        expected = ", ".join(
            f"{name} from {field.lowest:g} to {field.highest:g}" if field.highest < math.inf else f"{name}"
            for name, field in cls.fields.items()
        )
        unknown = [f"{name}={value!r}" for name, value in given.items() if name not in cls.fields]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: the pruning method {cls.name!r} expects {expected}.")
        first = next(iter(cls.fields))
        if given.get(first) is None:
            others = [f"{name}={value!r}" for name, value in given.items() if value is not None]
            if others:
                raise ValueError(f"{', '.join(others)} was given without {first}: expected both, or neither.")
            return None
        setting = {}
        for name, field in cls.fields.items():
            value = given.get(name)
            value = field.default if value is None else value
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or not field.lowest <= value <= field.highest:
                upto = f" and at most {field.highest:g}" if field.highest < math.inf else ""
                raise ValueError(
                    f"{name}={value!r}: expected a finite number of at least {field.lowest:g}{upto};"
                    f" {first}={cls.off:g} is off."
                )
            setting[name] = value
        return None if setting[first] == cls.off else setting

    @classmethod
    def most(cls, config) -> float:
        """Return the first number's value that prunes most; the path goes there from `off`."""
        return 0.0

    @classmethod
    def path(cls, config, settings: list[dict] = (), start: float | None = None) -> Path:
        """Return the path from no pruning to most.

        settings: settings that it has to go through; start: the `start` of an earlier path of the same model.
        """
        first = next(iter(cls.fields))
        others = {name: value for entry in settings[:1] for name, value in entry.items() if name != first}
        length = cls.most(config) - cls.off
        return Path(
            tuple(step / 16 for step in range(17)),
            lambda point: {**others, first: cls.off + point * length},
            lambda setting: (setting[first] - cls.off) / length,
            moderate=0.3,
        )

    @classmethod
    def scan(cls, config, settings, measure: Callable[[dict], float], start=None) -> tuple[Path, list[tuple]]:
        """Return the path and the reductions measured along it, (point, reduction) pairs.

        measure: a setting's reduction on a few samples.
        """
        path = cls.path(config, settings, start)
        first = next(iter(cls.fields))
        settings_there = [(point, path.setting(point)) for point in path.points]
        return path, [(p, 0.0 if setting[first] == cls.off else measure(setting)) for p, setting in settings_there]

    @classmethod
    def between(cls, low: dict, high: dict, share: float) -> dict[str, float]:
        """Return the setting at a share of the way from one setting to another."""
        return {
            name: value if value == high[name] else value + share * (high[name] - value) for name, value in low.items()
        }

    # What it costs

    @classmethod
    def layer_flops(cls, config, branch, layer: int, tokens: torch.Tensor) -> torch.Tensor | float:
        """Count the multiply-accumulates that the method adds to a layer, which `tokens` (B,) enter.

        branch: the configuration of the layer's branch.
        """
        return 0.0

    # A layer

    def prunes(self, layer: int, sequences: Sequences) -> bool:
        """Return whether this layer may remove tokens or uses the method's attention; if not, attention is plain."""
        return self.spec.num_removable(sequences) > 2

    def divide(self, sequences: Sequences, width: int) -> Chunking:
        """Divide the batch into the chunks that attention takes one at a time, for states of this width."""
        return divide(sequences, width) if self.needs in WITH_STATISTICS else whole(sequences)

    def read_input(self, layer: int, states: torch.Tensor, sequences: Sequences):
        """Compute the tokens' scores (R, T) and the alignment feature (B, T, E) from a layer's input (R, D).

        Each is None if the method does not use it.
        """
        return None, None

    def decide(self, layer: int, found, scores: torch.Tensor | None, chunk: Sequences) -> Decision:
        """Decide which tokens of a chunk stay, from what attention found and the batch's scores (R, T)."""
        raise NotImplementedError

    # A method whose decision Triton's kernels compute sets this to a function (method, query_key_value, scores,
    # sequences) -> `Attended`, or None where they can't. Subclasses, which may decide otherwise, do not inherit it.
    attend_in_kernels = None

    def attend(
        self, layer: int, query_key_value: torch.Tensor, scores, sequences: Sequences, dropout: float, all_maps=None
    ) -> Attended:
        """Compute self-attention of (R, 3, H, d), and decide for each chunk of the batch.

        all_maps: an optional list that each chunk's attention maps (n, H, L, L) are appended to.
        """
        if all_maps is None and takes_kernels(query_key_value, sequences, dropout=dropout):
            function = vars(type(self)).get("attend_in_kernels")
            attended = None if function is None else in_kernels(function, self, query_key_value, scores, sequences)
            if attended is not None:
                return attended
        chunking = self.divide(sequences, query_key_value.shape[2] * query_key_value.shape[3])
        outputs, decisions = [], []
        for chunk in chunking.chunks(sequences):
            if self.needs in WITH_STATISTICS:
                with_keys = self.needs == "statistics_and_keys"
                output, found = attend_with_statistics(query_key_value, chunk, self.spec, dropout, all_maps, with_keys)
            else:
                output, found = attend_fused(query_key_value, chunk, self.spec, self.needs, dropout, all_maps)
            outputs.append(output)
            decisions.append(self.decide(layer, found, scores, chunk))
        return Attended(chunking.join_rows(outputs, sequences), chunking, decisions)

    def to(self, device, non_blocking: bool = False) -> "PruningMethod":
        """Move to a device, for models whose layers are on several devices; here, there is nothing to move."""
        return self


class FixedCountMethod(PruningMethod):
    """The base class of methods that leave a number of tokens that the sequence's length alone decides.

    All sequences of a batch have one length, as images of one size do. A subclass implements `num_left`.
    """

    modalities = ("vision",)
    has_fixed_counts = True
    needs = None

    def num_left(self, layer: int, num_removable: int) -> int:
        """Return how many of N removable tokens a layer leaves, the merged one included."""
        raise NotImplementedError

    def prunes(self, layer, sequences):
        if sequences.mask is not None:
            raise ValueError(
                f"The pruning method {self.name!r} takes sequences of one length, and layer {layer} gets some of up to"
                f" {sequences.max_seqlen} tokens with padding: expected images of one size."
            )
        return self.num_left(layer, self.spec.num_removable(sequences)) < self.spec.num_removable(sequences)

    def keep_most(self, layer: int, priority: torch.Tensor, weight: torch.Tensor) -> Decision:
        """Keep the tokens of highest `priority` (n, N); the others merge into one, weighted by `weight` (n, N)."""
        number = self.num_left(layer, priority.shape[1])
        kept = priority.topk(number - 1).indices  # besides the merged token
        stays = torch.zeros_like(priority, dtype=torch.bool).scatter(1, kept, True)
        merges = torch.ones_like(stays[:, :1])
        return Decision(weight.masked_fill(stays, 0), stays, merges, length=number + self.spec.num_protected)


def share_left(num_removable: int, keep_rate: float) -> int:
    """Return how many tokens are left if the share `keep_rate` stays and the others merge into one.

    All are left if merging would save none.
    """
    kept = math.ceil(keep_rate * num_removable)
    return kept + 1 if kept < num_removable - 1 else num_removable
