"""Run the ONNX graphs that `madtp-hf export` writes, with onnxruntime.

This file lies beside the graphs, with `images.py`, which decodes images, and `texts.py`, which tokenizes. They need
numpy, onnxruntime, Pillow and transformers, whose processor preprocesses texts and images; they need neither torch nor
madtp_hf.

    from onnx_runner import OnnxModel

    model = OnnxModel("folder")
    print(model("scene.png", "how many sevens are there?"))
"""

import json
from pathlib import Path

import numpy as np


try:
    from ..modeling.images import read_image
    from ..modeling.texts import tokenize
except ImportError:  # beside the graphs
    from images import read_image  # type: ignore[no-redef]
    from texts import tokenize  # type: ignore[no-redef]

DESCRIPTION = "onnx.json"
_CLASSES = {"clip": "CLIPProcessor"}  # processor classes by task; BlipProcessor for all others


def _as_list(value) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _softmax(scores: np.ndarray) -> np.ndarray:
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return scores / scores.sum(axis=-1, keepdims=True)


class OnnxModel:
    """The ONNX graphs of a model with its processor: images and texts in, answers out.

    Args:
        folder (`str` or `os.PathLike`): The folder that `madtp-hf export` has written.
        providers (`list[str]`, *optional*): onnxruntime's execution providers, in order of preference; by default its
            CPU provider.
        session_options (`onnxruntime.SessionOptions`, *optional*): Options of all graphs, such as the number of
            threads.

    Raises:
        FileNotFoundError: if it isn't such a folder, or a graph is missing.
    """

    def __init__(self, folder, providers: list[str] | None = None, session_options=None):
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("Running ONNX graphs needs onnxruntime: pip install onnxruntime.") from error
        import transformers

        self.folder = Path(folder)
        if not (self.folder / DESCRIPTION).is_file():
            raise FileNotFoundError(f"{folder} has no {DESCRIPTION}: expected a folder that `madtp-hf export` wrote.")
        self.description = json.loads((self.folder / DESCRIPTION).read_text(encoding="utf-8"))
        self.task = self.description["task"]
        missing = [g["file"] for g in self.description["graphs"].values() if not (self.folder / g["file"]).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} lacks {missing[0]}, which its {DESCRIPTION} lists: export again.")
        processor_class = getattr(transformers, _CLASSES.get(self.task, "BlipProcessor"))
        self.processor = processor_class.from_pretrained(self.folder)
        self.sessions = {
            name: onnxruntime.InferenceSession(
                str(self.folder / graph["file"]), session_options, providers=providers or ["CPUExecutionProvider"]
            )
            for name, graph in self.description["graphs"].items()
        }

    def __call__(self, images, texts=None, max_new_tokens: int | None = None, truncation: bool = False):
        """Run the model's task on images and texts.

        Args:
            images: A PIL image or a path, or a list of them; for visual reasoning, a pair of images or a list of
                pairs, the left image first.
            texts (`str` or `list[str]`, *optional*): A text or a list of them: a question or sentence for each image,
                or one for all; for retrieval and CLIP, texts to compare with every image; for captioning, optional
                prompts that captions continue.
            max_new_tokens (`int`, *optional*): The maximum number of tokens to generate; by default 10 for an answer
                and 20 for a caption.
            truncation (`bool`, *optional*): Truncate texts that are longer than the model takes, with one warning,
                instead of refusing them.

        Returns:
            Question answering and captioning: a list of strings. Visual reasoning: the probability that each sentence
            is true, (sentences,). Retrieval: `{"score", "similarity"}`, each (images, texts): the probability of a
            match, and the cosine similarity of the features. CLIP: the probabilities of the texts for each image,
            (images, texts); each row adds up to 1.
        """
        if self.task != "captioning" and texts is None:
            raise ValueError(
                f"texts is missing: expected a string or a list of strings, as this model's task is {self.task}."
            )
        if self.task == "nlvr2":
            pairs = images if isinstance(images[0], (list, tuple)) else [images]
            return self._judge(pairs, self.read_texts(self._for_each(texts, len(pairs)), truncation))
        images = _as_list(images)
        if self.task == "captioning":
            prompts = self._tokenize(self._for_each(texts or "", len(images)), truncation, room=1)
            return self._caption(self.read_images(images), prompts["input_ids"], max_new_tokens or 20)
        if self.task == "vqa":
            questions = self.read_texts(self._for_each(texts, len(images)), truncation)
            return self._answer(self.read_images(images), questions, max_new_tokens or 10)
        compare = self._match if self.task == "retrieval" else self._zero_shot
        return compare(self.read_images(images), self.read_texts(_as_list(texts), truncation))

    def run(self, graph: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run one graph; its inputs and outputs have the names in `description["graphs"]`."""
        session = self.sessions[graph]
        names = [node.name for node in session.get_outputs()]
        return dict(zip(names, session.run(names, inputs)))

    def read_images(self, images: list) -> np.ndarray:
        """Preprocess images, or paths of them, to pixel_values (B, 3, H, W)."""
        opened = [read_image(image) for image in images]
        return self.processor.image_processor(opened, return_tensors="np")["pixel_values"].astype(np.float32)

    def read_texts(self, texts: list[str], truncation: bool = False) -> dict[str, np.ndarray]:
        """Tokenize texts to input_ids and attention_mask (B, L), padded on the right.

        Raises:
            ValueError: if a text is longer than the model takes, and is not to be truncated.
        """
        read = self.processor.tokenizer.pad(
            self._tokenize(texts, truncation), padding=True, padding_side="right", return_tensors="np"
        )
        return {name: read[name].astype(np.int64) for name in ("input_ids", "attention_mask")}

    def _tokenize(self, texts: list[str], truncation: bool, room: int = 0):
        """Tokenize texts of different lengths, which leave `room` for tokens that the model adds."""
        return tokenize(self.processor.tokenizer, texts, self.description["max_text_length"] - room, truncation)

    @staticmethod
    def _for_each(texts, number: int) -> list[str]:
        texts = _as_list(texts)
        if len(texts) not in (1, number):
            raise ValueError(
                f"{number} image(s) and {len(texts)} text(s): expected one text for all, or one for each."
            )
        return texts * number if len(texts) != number else texts

    # The tasks

    def _answer(self, pixel_values, questions: dict[str, np.ndarray], max_new_tokens: int) -> list[str]:
        states = self.run("vision_encoder", pixel_values=pixel_values)["image_states"]
        encoded = self.run("question_encoder", image_states=states, **questions)
        start = np.full((len(pixel_values), 1), self.description["decoder"]["start_token_id"], dtype=np.int64)
        return self._decode_text(self.generate(encoded, start, np.ones_like(start), max_new_tokens))

    def _caption(self, pixel_values, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
        encoded, facts = self.run("vision_encoder", pixel_values=pixel_values), self.description["decoder"]
        rows = [[facts["start_token_id"], *ids[1:-1]] for ids in prompts]
        width = max(map(len, rows))
        # Left padding, so that all rows continue at the same position.
        prompt = np.array([[facts["pad_token_id"]] * (width - len(row)) + row for row in rows], dtype=np.int64)
        mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=np.int64)
        return self._decode_text(self.generate(encoded, prompt, mask, max_new_tokens))

    def generate(
        self, encoded: dict[str, np.ndarray], input_ids: np.ndarray, attention_mask: np.ndarray, max_new_tokens: int
    ) -> np.ndarray:
        """Generate greedily from input_ids (B, L) until all rows have ended.

        encoded: the outputs of the encoder graph in front of the decoder. Returns (B, L + generated), padded after the
        end.
        """
        facts = self.description["decoder"]
        batch_size, layers = len(input_ids), range(facts["num_layers"])
        empty = np.zeros((batch_size, facts["num_heads"], 0, facts["head_width"]), dtype=np.float32)
        kinds = [f"{layer}.{{}}.{part}" for layer in layers for part in ("key", "value")]
        fixed = {f"past_key_values.{k.format('encoder')}": encoded[f"present.{k.format('encoder')}"] for k in kinds}
        fixed["encoder_attention_mask"] = encoded["encoder_attention_mask"]
        past = {f"past_key_values.{k.format('decoder')}": empty for k in kinds}
        max_new_tokens = min(max_new_tokens, self.description["max_text_length"] - input_ids.shape[1])
        written, step, running = input_ids, input_ids, np.ones(batch_size, dtype=bool)
        for _ in range(max_new_tokens):
            output = self.run("decoder", input_ids=step, attention_mask=attention_mask, **past, **fixed)
            token = output["logits"][:, -1].argmax(axis=-1)
            token = np.where(running, token, facts["pad_token_id"]).astype(np.int64)
            running = running & (token != facts["end_token_id"])
            step = token[:, None]
            written = np.concatenate([written, step], axis=1)
            if not running.any():
                break
            attention_mask = np.concatenate([attention_mask, np.ones_like(step)], axis=1)
            past = {name: output[name.replace("past_key_values", "present")] for name in past}
        return written

    def _decode_text(self, ids: np.ndarray) -> list[str]:
        return [text.strip() for text in self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _judge(self, pairs: list, sentences: dict[str, np.ndarray]) -> np.ndarray:
        states = self.run("vision_encoder", pixel_values=self.read_images([image for pair in pairs for image in pair]))
        left, right = states["image_states"][0::2], states["image_states"][1::2]
        return _softmax(self.run("classifier", left_states=left, right_states=right, **sentences)["logits"])[:, 1]

    def _match(self, pixel_values, texts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = self.run("vision_encoder", pixel_values=pixel_values)
        features = self.run("text_encoder", **texts)["text_feature"]
        scores = []
        for states in images["image_states"]:
            of_image = np.repeat(states[None], len(features), axis=0)
            scores.append(_softmax(self.run("matching_head", image_states=of_image, **texts)["itm_score"])[:, 1])
        return {"score": np.stack(scores), "similarity": images["image_feature"] @ features.T}

    def _zero_shot(self, pixel_values, texts: dict[str, np.ndarray]) -> np.ndarray:
        images = self.run("vision_encoder", pixel_values=pixel_values)["image_feature"]
        return _softmax(self.description["logit_scale"] * images @ self.run("text_encoder", **texts)["text_feature"].T)
