"""Checks of the models' inputs, and functions that move the padding of texts."""

import torch


LONGER_THAN_ANY = 2**20  # more tokens than any sequence has


def check_same_shape(name: str, tensor: torch.Tensor, input_ids: torch.Tensor) -> None:
    if tensor.shape != input_ids.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and input_ids {tuple(input_ids.shape)}: expected the same."
        )


def check_same_number(images: int, texts: int, kind: str) -> None:
    if images != texts:
        raise ValueError(f"input_ids holds {texts} {kind} and pixel_values {images} images: expected equal numbers.")


def check_images(pixel_values: torch.Tensor, size: int, any_size: bool) -> None:
    """Raise a `ValueError` unless pixel_values are images (B, 3, size, size), or of any size if `any_size`."""
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}: expected (batch_size, 3, height, width), as the"
            " model's image processor returns."
        )
    if pixel_values.shape[0] == 0:
        raise ValueError("pixel_values holds no image: expected at least one.")
    if not any_size and tuple(pixel_values.shape[2:]) != (size, size):
        height, width = pixel_values.shape[2:]
        raise ValueError(
            f"pixel_values are images of {height} x {width} pixels: this model takes {size} x {size}. Resize them with"
            " its image processor, or pass interpolate_pos_encoding=True."
        )


def check_text_length(length: int, longest: int) -> None:
    if length > longest:
        raise ValueError(
            f"input_ids holds a text of {length} tokens: this model reads at most {longest}. Tokenize with"
            f" truncation=True, max_length={longest}."
        )


def text_lengths(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[int]:
    """Return the number of real tokens in each text. The host waits for the device once.

    Raises:
        ValueError: if the mask's shape is not that of input_ids, or a text has no real token.
    """
    check_same_shape("attention_mask", attention_mask, input_ids)
    lengths = attention_mask.bool().sum(dim=1).tolist()
    check_no_empty_text(lengths)
    return lengths


def check_no_empty_text(lengths: list[int]) -> None:
    empty = [row for row, length in enumerate(lengths) if length == 0]
    if empty:
        raise ValueError(
            f"attention_mask is 0 everywhere in row {empty}: expected at least one real token in each text."
        )


def left_align(input_ids: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move padding, wherever it is, after the text: return input_ids and real (B, L) in the new order.

    The host reads no values and does not wait for the device: shapes depend on shapes alone.
    """
    width = input_ids.shape[1]
    # A stable sort, by operations that can be exported to ONNX for any width.
    order = (real * LONGER_THAN_ANY - torch.arange(width, device=real.device)).topk(width).indices
    return input_ids.gather(1, order), real.gather(1, order)


def put_back(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Scatter left-aligned states (B, M, D) back to their original slots: (B, L, D), 0 elsewhere.

    order (B, L): the original slot of each token in the order that `left_align` gave; M may be less than L.
    """
    places = order[:, : states.shape[1]].unsqueeze(-1).expand_as(states)
    return states.new_zeros(*order.shape, states.shape[2]).scatter(1, places, states)


def read_prompts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, text_config
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Turn prompts (B, L) from a tokenizer, padded on either side, into a decoder's input_ids (B, L - 1) and its mask.

    The decoder's start token replaces the first token, the last token is removed, and padding moves to the front, so
    that generation continues at the same slot in all samples. The mask is None without padding.
    """
    start = text_config.bos_token_id
    if attention_mask is None or min(text_lengths(input_ids, attention_mask)) == input_ids.shape[1]:
        return torch.nn.functional.pad(input_ids[:, 1:-1], (1, 0), value=start), None
    ids, real = (tensor.flip(1) for tensor in left_align(input_ids.flip(1), attention_mask.bool().flip(1)))
    ids, real = ids[:, :-1], real[:, :-1].clone()
    real[:, -1] = True  # a prompt without words keeps its start token
    ids = ids.masked_fill(real.cumsum(dim=1) == 1, start).masked_fill(~real, text_config.pad_token_id)
    return ids, real.long()
