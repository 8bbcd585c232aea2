"""Log-likelihoods of answers and captions, computed from the model's logits alone."""

import torch


@torch.no_grad()
def log_likelihood(model, processor, pixels, text: str, answer: str, prompt: str = "") -> float:
    """The log-likelihood of an answer to a question, or of a caption after a prompt, with the end of text."""
    tokenizer, start = processor.tokenizer, model.config.text_config.bos_token_id
    inputs = tokenizer(text, return_tensors="pt") if text else {}
    ids = tokenizer(f"{prompt} {answer}".strip(), return_tensors="pt").input_ids
    ids[:, 0] = start
    if text:
        logits = model(**inputs, pixel_values=pixels, labels=ids).logits
    else:
        logits = model(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    chosen = logits[:, :-1].float().log_softmax(dim=-1).gather(-1, ids[:, 1:, None])
    return chosen[0, len(tokenizer(prompt).input_ids) - 2 :].sum().item()
