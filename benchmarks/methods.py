"""MADTP with one of its three terms of importance left out, to see what each contributes.

They are pruning methods like the package's: `model.set_pruning_method("without_self")`, once this file is imported.
"""

from madtp_hf.modeling.method_madtp import MadtpMethod
from madtp_hf.modeling.token_pruning import pooling_importance, strongest_alignment, sum_over_tokens


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


ABLATIONS = ("without_self", "without_class", "without_alignment")
