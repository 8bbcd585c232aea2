"""Token Merging, ToMe (arXiv 2210.09461): in every layer, some tokens merge into the most similar others."""

import math

import torch
import torch.nn.functional as F

from .pruning_method import Decision, Field, FixedCountMethod


class TomeMethod(FixedCountMethod):
    """ToMe: every second removable token may merge into one of those between; the `r` most similar pairs merge.

    No layer merges more than half of its tokens; if `r` is fractional, some layers merge one more than others.
    Similarity is the cosine of the keys' means over heads. A merged token is the mean of all its patches, and its
    attention logits are biased by the log of their number. As in ToMe, the next layer pairs the tokens in this order:
    first the unmerged candidates, then the tokens between. Their rows in memory keep the original order.
    """

    name = "tome"
    fields = {"r": Field(0, 10**4)}
    off = 0.0
    needs = "keys"

    def __init__(self, spec, setting, num_layers):
        super().__init__(spec, setting, num_layers)
        # By layer, (n, N): the removable tokens that enter the layer, in the order in which they are paired.
        self.orders: dict[int, torch.Tensor] = {}

    @classmethod
    def most(cls, config):
        return (config.vision_config.image_size // config.vision_config.patch_size) ** 2 / 2

    @classmethod
    def layer_flops(cls, config, branch, layer, tokens):
        """Count the similarities of half of the keys with the other half."""
        return (tokens / 2) ** 2 * (branch.hidden_size // branch.num_attention_heads)

    def num_left(self, layer, num_removable):
        r = self.setting["r"]
        return num_removable - min(math.floor((layer + 1) * r) - math.floor(layer * r), num_removable // 2)

    def prunes(self, layer, sequences):
        return super().prunes(layer, sequences) or layer in self.orders  # which it hands on

    def decide(self, layer, keys, scores, chunk):
        shape, device = keys.shape[:2], keys.device  # which the layer before may not share
        left = self.num_left(layer, shape[1])
        sizes = self.spec.sizes(chunk)
        order = self.orders.get(layer, torch.arange(shape[1], device=device).expand(shape)).to(device)
        stays = torch.ones(shape, dtype=torch.bool, device=device)
        into, weight = torch.zeros(shape, dtype=torch.long, device=device), torch.zeros_like(sizes)
        if left < shape[1]:
            leaving, entered, staying = self._pairs(keys, order, shape[1] - left)
            of_leaving = sizes.gather(1, leaving)
            sizes = sizes.scatter_add(1, entered, of_leaving)
            weight = weight.scatter(1, leaving, of_leaving / sizes.gather(1, entered))
            stays, into = stays.scatter(1, leaving, False), into.scatter(1, leaving, entered)
            order = (stays.cumsum(dim=1) - 1).gather(1, staying)
        self.orders[layer + 1] = order
        length = left + self.spec.num_protected
        return Decision(weight, stays, torch.ones_like(stays[:, :1]), into, length, sizes=sizes)

    @staticmethod
    def _pairs(keys: torch.Tensor, order: torch.Tensor, number: int) -> tuple[torch.Tensor, ...]:
        """From keys (n, N, d), choose the `number` tokens that leave; also return their targets and all that stay.

        All three are removable tokens; those that stay are in ToMe's order.
        """
        metric = F.normalize(keys.gather(1, order.unsqueeze(-1).expand_as(keys)), dim=-1)
        targets, candidates = order[:, ::2], order[:, 1::2]
        similarity, partner = (metric[:, 1::2] @ metric[:, ::2].transpose(1, 2)).max(dim=-1)
        ranked = similarity.argsort(dim=-1, descending=True)
        leaving, remaining = ranked[:, :number], ranked[:, number:].sort(dim=-1).values
        entered = targets.gather(1, partner.gather(1, leaving))
        staying = torch.cat([candidates.gather(1, remaining), targets], dim=1)
        return candidates.gather(1, leaving), entered, staying
