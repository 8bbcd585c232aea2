from .collators import CaptioningCollator, QuestionAnsweringCollator, RetrievalCollator, VisualReasoningCollator
from .digit_scenes import load_digit_captions, load_digit_questions, load_digit_statements, question_only_accuracy
from .published import load_coco_captions, load_flickr30k, load_nlvr2, load_vqav2
from .rows import load_rows, load_table, open_rows


__all__ = [
    "CaptioningCollator",
    "QuestionAnsweringCollator",
    "RetrievalCollator",
    "VisualReasoningCollator",
    "load_coco_captions",
    "load_digit_captions",
    "load_digit_questions",
    "load_digit_statements",
    "load_flickr30k",
    "load_nlvr2",
    "load_rows",
    "load_table",
    "load_vqav2",
    "open_rows",
    "question_only_accuracy",
]
