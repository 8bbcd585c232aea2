"""Random tokens, for comparison: in every layer, a random share of the tokens merges into one, their mean."""

import torch

from .pruning_method import Field, FixedCountMethod, share_left


class RandomMethod(FixedCountMethod):
    """Keep the share `keep_rate` of the tokens, drawn at random; the others become their mean.

    Draws depend on the setting's `seed`, the layer and the sample's place in the batch, and so are the same in every
    pass.
    """

    name = "random"
    fields = {"keep_rate": Field(0, 1), "seed": Field(0, 2**31, default=0)}

    def num_left(self, layer, num_removable):
        return share_left(num_removable, self.setting["keep_rate"])

    def decide(self, layer, found, scores, chunk):
        number = self.spec.num_removable(chunk)
        generator = torch.Generator().manual_seed(int(self.setting.get("seed", 0)) * 1009 + layer)
        first, step = torch.rand(2, 1, number, generator=generator, device="cpu").to(chunk.device)
        # Sample by sample, a token's draw goes round the unit interval in steps of its own, whatever the batch's size.
        priority = (first + step * torch.arange(chunk.batch_size, device=chunk.device).unsqueeze(1)) % 1
        number_merged = number - self.num_left(layer, number) + 1
        return self.keep_most(layer, priority, weight=torch.full_like(priority, 1 / number_merged))
