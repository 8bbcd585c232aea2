from .collators import QuestionAnsweringCollator
from .digit_scenes import load_digit_questions, question_only_accuracy


__all__ = ["QuestionAnsweringCollator", "load_digit_questions", "question_only_accuracy"]
