"""MADTP with merging: tokens similar to a more important one are removed too, and merged into similar tokens.

The equations are in `token_pruning.py`.
"""

from .chunks import whole
from .method_madtp import MadtpMethod
from .pruning_method import Attended, Decision
from .sequences import Sequences
from .token_pruning import cosine_similarity, distinctness, merge_into_similar
from .triton_kernels import scored_varlen_attention
from .triton_merging import gate_and_assign


class MadtpMergeMethod(MadtpMethod):
    """MADTP with s' = s * distinctness in place of s; each removed token is merged into the most similar survivor.

    Similarity is the cosine of the keys' means over heads, as ToMe's. A token's size, the number of tokens that it
    counts as, weights it as a key of attention from the next layer on. Its setting is MADTP's: temperature and factor.
    """

    name = "madtp_merge"
    needs = "statistics_and_keys"
    adds_token = False

    @classmethod
    def layer_flops(cls, config, branch, layer, tokens):
        """Count MADTP's alignment scores, and the similarity of each two keys."""
        prunes = config.pruning_layers is None or layer < config.pruning_layers
        similarity = tokens**2 * (branch.hidden_size // branch.num_attention_heads) if prunes else 0.0
        return super().layer_flops(config, branch, layer, tokens) + similarity

    def attend_in_kernels(self, query_key_value, scores, sequences: Sequences) -> Attended | None:
        """Compute self-attention, importance and the decision in Triton's kernels; None if they do not fit."""
        spec, sizes = self.spec, sequences.sizes
        if not self.fits_kernels(scores):
            return None
        protects_last = spec.num_suffix_tokens == 1
        query, key, value = query_key_value.unbind(1)
        layout = sequences.cu_seqlens, sequences.max_seqlen
        output, *statistics = scored_varlen_attention(query, key, value, *layout, spec.is_causal, protects_last, sizes)
        setting = self.temperature, self.min_kept, protects_last, self.factor
        importance, destination, counts, cu_seqlens = gate_and_assign(
            scores, *statistics, key, sizes, *layout, *setting
        )
        decision = Decision(importance, destination=destination, cu_seqlens=cu_seqlens, sizes=counts)
        return Attended(output.flatten(1), whole(sequences), [decision])

    def decide(self, layer, statistics, scores, chunk):
        spec, mask = self.spec, self.spec.mask(chunk)
        scores = chunk.pad(scores)[:, spec.removable(chunk)]
        importance = self.importance(statistics, scores, spec.float_mask(chunk))
        similarity = cosine_similarity(statistics.keys)
        distinct = importance.clamp(min=0) * distinctness(importance, similarity, mask)
        stays, merges, length = self.select(layer, distinct, scores, chunk)
        into, weight, sizes = merge_into_similar(importance, similarity, spec.sizes(chunk), stays, mask)
        return Decision(weight, stays, merges, into, length, sizes=sizes)
