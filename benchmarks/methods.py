"""MADTP with a part left out, to see what each contributes: a term of importance, or a part of merging.

They are pruning methods like the package's: `model.set_pruning_method("without_self")`, once this file is imported.
"""

from madtp_hf.modeling.method_madtp import MadtpMethod
from madtp_hf.modeling.method_madtp_merge import MadtpMergeMethod
from madtp_hf.modeling.token_pruning import (
    merge_weights,
    pooling_importance,
    strongest_alignment,
    sum_over_tokens,
)


class TermsMethod(MadtpMethod):
    """MADTP whose importance is the mean of some of its terms."""

    name = None
    terms: tuple[str, ...]

    def importance(self, statistics, scores, mask):
        terms = []
        if "self" in self.terms:
            terms.append(statistics.received / sum_over_tokens(statistics.received))
        if "class" in self.terms:
            terms.append(pooling_importance(statistics))
        if "alignment" in self.terms:
            aligned = strongest_alignment(scores, mask)
            terms.append(aligned / sum_over_tokens(aligned))
        return sum(terms) / len(terms)


class WithoutSelf(TermsMethod):
    name, terms = "without_self", ("class", "alignment")


class WithoutClass(TermsMethod):
    name, terms = "without_class", ("self", "alignment")


class WithoutAlignment(TermsMethod):
    name, terms = "without_alignment", ("self", "class")


class MergeWithoutDistinctness(MadtpMergeMethod):
    """Tokens are chosen as MADTP chooses them, and merged into similar ones."""

    name = "merge_without_distinctness"

    def select(self, layer, importance, scores, chunk):
        return super().select(layer, self.of_tokens, scores, chunk)

    def importance(self, statistics, scores, mask):
        self.of_tokens = super().importance(statistics, scores, mask)
        return self.of_tokens


class MergeWithoutSizes(MadtpMergeMethod):
    """Attention doesn't weight a merged token by its size, and a merge doesn't know of earlier ones."""

    name = "merge_without_sizes"

    def decide(self, layer, statistics, scores, chunk):
        return super().decide(layer, statistics, scores, chunk)._replace(sizes=None)


class MergeIntoOne(MadtpMergeMethod):
    """Tokens are chosen by importance times distinctness, and the others become one token, as MADTP's do."""

    name, adds_token = "merge_into_one", True

    def decide(self, layer, statistics, scores, chunk):
        decision = super().decide(layer, statistics, scores, chunk)
        scores = chunk.pad(scores)[:, self.spec.removable(chunk)]
        importance = self.importance(statistics, scores, self.spec.float_mask(chunk))
        weight = merge_weights(importance, decision.stays, decision.merges)
        return decision._replace(weight=weight, into=None, sizes=None)


ABLATIONS = ("without_self", "without_class", "without_alignment")
MERGE_ABLATIONS = ("merge_without_distinctness", "merge_without_sizes", "merge_into_one")
