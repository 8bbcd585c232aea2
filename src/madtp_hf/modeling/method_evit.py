"""EViT (arXiv 2202.07800): in three layers, the tokens with the least class attention merge into one."""

from .pruning_method import FixedCountMethod, share_left


def prunes_in(num_layers: int) -> tuple[int, ...]:
    """Return the layers that prune, at a quarter, a half and three quarters of the depth."""
    return num_layers // 4, num_layers // 2, 3 * num_layers // 4


class EvitMethod(FixedCountMethod):
    """EViT: keep the share `keep_rate` of the tokens that the pooling query attends to most.

    The others become their attention-weighted sum.
    """

    name = "evit"
    needs = "pooling_attention"

    @classmethod
    def layer_flops(cls, config, branch, layer, tokens):
        """Count the pooling query's attention, which fused attention does not keep."""
        return tokens * branch.hidden_size if layer in prunes_in(branch.num_hidden_layers) else 0.0

    def num_left(self, layer, num_removable):
        prunes = layer in prunes_in(self.num_layers)
        return share_left(num_removable, self.setting["keep_rate"]) if prunes else num_removable

    def decide(self, layer, pooling_attention, scores, chunk):
        return self.keep_most(layer, pooling_attention, weight=pooling_attention)
