"""MADTP with merging: tokens similar to a more important one are removed too, and merged into similar tokens.

The equations are in `token_pruning.py`.
"""

from .method_madtp import MadtpMethod
from .pruning_method import Decision
from .token_pruning import cosine_similarity, distinctness, merge_into_similar


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

    def decide(self, layer, statistics, scores, chunk):
        spec, mask = self.spec, self.spec.mask(chunk)
        scores = chunk.pad(scores)[:, spec.removable(chunk)]
        importance = self.importance(statistics, scores, spec.float_mask(chunk))
        similarity = cosine_similarity(statistics.keys)
        distinct = importance.clamp(min=0) * distinctness(importance, similarity, mask)
        stays, merges, length = self.select(layer, distinct, scores, chunk)
        into, weight, sizes = merge_into_similar(importance, similarity, spec.sizes(chunk), stays, mask)
        return Decision(weight, stays, merges, into, length, sizes=sizes)
