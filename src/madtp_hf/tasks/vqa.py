"""Question answering: an answer to a question about an image, in words."""

from ..data.collators import QuestionAnsweringCollator
from ..metrics import load_metric
from ..modeling.modeling_madtp_blip import MadtpBlipForQuestionAnswering
from . import flop_formulas as flops
from . import onnx_parts as parts
from .task import INPUTS, Task


ANSWER_TOKENS = 10


def _generate(model, inputs, **options):
    return model.generate(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], **options)


def _predict(model, processor, batch) -> list[str]:
    written = _generate(model, batch, max_new_tokens=ANSWER_TOKENS)
    return processor.tokenizer.batch_decode(written, skip_special_tokens=True)


def _score(predictions, rows) -> dict[str, float]:
    # VQA accuracy expects the answers of ten annotators: up to three true answers are repeated to make ten.
    references = [list(row.get("answers") or [row["answer"]]) for row in rows]
    references = [answers if len(answers) > 3 else (answers * 10)[:10] for answers in references]
    scores = load_metric(TASK.metric).compute(predictions=predictions, references=references)
    return {"accuracy %": scores["accuracy"]}


def _flops(config, vision_tokens, text_tokens, answer_tokens, added):
    total = flops.vision_encoder(config, vision_tokens, added.get("vision"))
    total = total + flops.text_encoder(config, text_tokens, [vision_tokens[-1]], added.get("text"))
    return total + flops.text_decoder(config, answer_tokens, text_tokens[-1], config.text_config.hidden_size)


def _encode_questions(model, input_ids, attention_mask, image_states):
    texts = parts.pad_texts(model, input_ids, attention_mask)
    return parts.for_decoder(model, model._encode_text(*texts, *parts.layout(image_states)), model.is_pruning)


def _graphs(model, sizes: parts.Sizes) -> dict[str, parts.Graph]:
    return {
        "vision_encoder": parts.vision_encoder_graph(model, sizes),
        "question_encoder": parts.Graph(
            "Questions about images: what the decoder reads, a mask and the keys and values of its cross-attention.",
            _encode_questions,
            {**parts.texts(model, sizes), **parts.states(model, sizes, "image_states")},
            ["encoder_attention_mask", *parts.cache_names(model, "encoder", "present")],
        ),
        "decoder": parts.decoder(model, sizes, 4 + 5 * sizes.batch, varies=True),
    }


TASK = Task(
    name="vqa",
    model_class=MadtpBlipForQuestionAnswering,
    flops=_flops,
    graphs=_graphs,
    decoder_inputs="decoder_input_ids",
    collator=QuestionAnsweringCollator,
    text_column="question",
    target_columns=("answers", "answer"),
    metric="vqa_accuracy",
    headline="accuracy %",
    headline_title="accuracy",
    auto_class="AutoModelForVisualQuestionAnswering",
    pipeline_call='ask(image="image.jpg", question={text})',
    original_parts=("text_encoder", "text_decoder"),
    title="question answering",
    what="answers questions about images",
    usage=INPUTS + "print(processor.decode(model.generate(**inputs)[0], skip_special_tokens=True))",
    text="how many dogs are there?",
    baseline="Language-only baseline, from the words of the questions",
    pipeline_tag="visual-question-answering",
    predict=_predict,
    score=_score,
    generate=_generate,
    timed_tokens=4,
    script="run_vqa.py",
)
