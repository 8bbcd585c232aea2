"""The visual question answering pipeline, which transformers 5 no longer has; a checkpoint brings this one along."""

from transformers import Pipeline
from transformers.image_utils import load_image


class MadtpBlipVisualQuestionAnsweringPipeline(Pipeline):
    """Answers questions about images.

    ```python
    >>> from transformers import pipeline

    >>> ask = pipeline("visual-question-answering", model=checkpoint, trust_remote_code=True)
    >>> ask(image="scene.png", question="how many sevens are there?")
    [{"answer": "two", "score": 0.93}]
    ```

    Parameters of a call, or of `pipeline(...)` for all calls: `top_k` (answers a question, the likeliest first; 1 if not given), `max_new_tokens`
    and what else the model's `generate` takes, as `generate_kwargs`; `padding`, `truncation` and `timeout` (seconds, to fetch an image) as
    elsewhere. A score is the probability of the answer, token by token.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = True

    def _sanitize_parameters(
        self,
        top_k=None,
        padding=None,
        truncation=None,
        timeout=None,
        max_new_tokens=None,
        generate_kwargs=None,
        **unknown,
    ):
        if unknown:
            raise TypeError(
                f"The pipeline got {', '.join(unknown)}: expected top_k, padding, truncation, timeout, max_new_tokens or generate_kwargs."
            )
        preprocess, forward = {}, {}
        for name, value in (("padding", padding), ("truncation", truncation), ("timeout", timeout)):
            if value is not None:
                preprocess[name] = value
        if top_k is not None:
            if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
                raise ValueError(f"top_k={top_k!r}: expected a whole number of at least 1.")
            forward["top_k"] = top_k
        if max_new_tokens is not None:
            forward["max_new_tokens"] = max_new_tokens
        if generate_kwargs is not None:
            forward["generate_kwargs"] = generate_kwargs
        return preprocess, forward, {}

    def __call__(self, image=None, question=None, **kwargs):
        r"""
        Args:
            image (`str`, `PIL.Image.Image`, `dict` or a list of them):
                An image, or a path, URL or base64 string of one; or, without a question, `{"image": ..., "question": ...}`, a list or a
                dataset of such.
            question (`str` or `list[str]`, *optional*):
                One question or several. Of several images and several questions, each question is asked about each image,
                question by question.

        Returns:
            A list of `{"answer": str, "score": float}`, the likeliest first; for several questions or images a list of such lists.
        """
        if question is None:
            if image is None or isinstance(image, str) or hasattr(image, "size"):
                raise ValueError("question is missing: expected image=... and question=..., or a dict of both.")
            return super().__call__(image, **kwargs)
        if image is None:
            raise ValueError("image is missing: expected image=... and question=..., or a dict of both.")
        one_image = isinstance(image, str) or hasattr(image, "size")
        images = [image] if one_image else list(image)
        if one_image and isinstance(question, str):
            return super().__call__({"image": image, "question": question}, **kwargs)
        questions = [question] if isinstance(question, str) else list(question)
        return super().__call__([{"image": i, "question": q} for q in questions for i in images], **kwargs)

    def preprocess(self, inputs, padding=False, truncation=True, timeout=None):
        image = load_image(inputs["image"], timeout=timeout)
        text = self.tokenizer(
            inputs["question"],
            return_tensors="pt",
            padding=padding,
            truncation=truncation,
            max_length=self.model.config.text_config.max_position_embeddings if truncation else None,
        )
        pixel_values = self.image_processor(images=image, return_tensors="pt").pixel_values
        return {
            "input_ids": text.input_ids,
            "attention_mask": text.attention_mask,
            "pixel_values": pixel_values.to(self.model.dtype),
        }

    def _forward(self, model_inputs, top_k=1, max_new_tokens=10, generate_kwargs=None):
        defaults = {"num_beams": top_k, "do_sample": False, "max_new_tokens": max_new_tokens}
        fixed = {"num_return_sequences": top_k, "return_dict_in_generate": True, "output_scores": True}
        output = self.model.generate(**model_inputs, **{**defaults, **(generate_kwargs or {}), **fixed})
        beams = getattr(output, "beam_indices", None)
        log_probabilities = self.model.text_decoder.compute_transition_scores(
            output.sequences, output.scores, beams, normalize_logits=beams is None
        )
        # What follows the end of an answer is padding, and no part of it.
        padding = output.sequences[:, 1:] == self.model.config.text_config.pad_token_id
        scores = log_probabilities.masked_fill(padding, 0.0).sum(dim=1).exp()
        return {"sequences": output.sequences.unflatten(0, (-1, top_k)), "scores": scores.unflatten(0, (-1, top_k))}

    def postprocess(self, model_outputs):
        answers = self.tokenizer.batch_decode(model_outputs["sequences"][0], skip_special_tokens=True)
        scores = model_outputs["scores"][0].float().tolist()
        return sorted(
            ({"answer": answer.strip(), "score": score} for answer, score in zip(answers, scores)),
            key=lambda answer: -answer["score"],
        )


__all__ = ["MadtpBlipVisualQuestionAnsweringPipeline"]
