"""Class attention: a token's importance is the pooling query's attention alone, s = s_cls, with MADTP's threshold."""

from .method_madtp import MadtpMethod
from .token_pruning import pooling_importance


class ClassAttentionMethod(MadtpMethod):
    """MADTP with s = s_cls. Its setting is MADTP's: temperature and factor."""

    name = "class_attention"
    importance_is_aligned = False

    def importance(self, statistics, scores, mask):
        return pooling_importance(statistics)
