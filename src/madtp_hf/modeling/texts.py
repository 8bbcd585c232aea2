"""Tokenize texts: those that are too long are an error or, on request, truncated. It needs no torch."""

from transformers.utils import logging


logger = logging.get_logger("transformers.models.madtp")


def tokenize(tokenizer, texts, longest: int, truncation: bool | str | None = False, **options):
    """Tokenize texts of at most `longest` tokens; longer ones raise an error or, on request, are truncated.

    Truncating warns once. truncation: None is False where the user has no such option. options: further arguments of
    the tokenizer.
    """
    read = tokenizer(texts, truncation=False, verbose=False, **options)
    rows = read["input_ids"]
    rows = rows if len(rows) and hasattr(rows[0], "__len__") else [rows]
    length = max(map(len, rows))
    if length <= longest:
        return read
    if not truncation:
        advice = "Shorten it." if truncation is None else "Shorten it, or pass truncation=True."
        raise ValueError(f"A text is {length} tokens long: this model reads at most {longest}. {advice}")
    logger.warning_once(f"Texts of more than {longest} tokens are truncated.")
    return tokenizer(texts, max_length=longest, truncation=truncation, **options)
