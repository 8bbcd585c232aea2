"""Train the tiny dense BLIP that the examples prune: on digit scenes, from scratch, on a CPU.

Training follows BLIP: first the vision tower on labelled images, then the whole model on captions of scenes, then on
questions about them, with question encoder and answer decoder both initialised from the caption decoder. In the next
stage the class token learns to attend to the digits in every layer, as class tokens of large vision towers come to do
by themselves; in the last stage patches without a digit are also dropped at random. Scenes are newly drawn at every
step. `--plain` skips these two stages: nothing prepares that model for pruning.

    python examples/train_dense_blip.py --output_dir examples/blip-vqa-digits
    python examples/train_dense_blip.py --plain --output_dir examples/blip-vqa-digits-plain
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
)

from madtp_hf.data import digit_scenes as ds


def build_processor() -> BlipProcessor:
    """Build a BLIP processor whose word-piece vocabulary has just the words of questions, answers and captions."""
    words = (
        "is there a does the image show how many are what number of in which digit color have next first from".split()
    )
    words += "leftmost rightmost topmost bottommost left right top bottom above below".split()
    words += "pair pairs has more than same no yes".split()
    words += [*ds.DIGIT_NAMES, *ds.COLOR_NAMES, "##s", "##es", "?", ":", ",", "."]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(words), "[DEC]", "[ENC]"]
    tokenizer = BertTokenizer(
        vocab={word: index for index, word in enumerate(vocab)},
        bos_token="[DEC]",
        additional_special_tokens=["[ENC]"],
        model_max_length=32,
    )
    size = {"height": ds.CANVAS_SIZE, "width": ds.CANVAS_SIZE}
    return BlipProcessor(BlipImageProcessor(size=size), tokenizer)


def build_config(tokenizer, args) -> BlipConfig:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": args.width,
        "intermediate_size": 4 * args.width,
        "num_hidden_layers": args.text_layers,
        "num_attention_heads": args.heads,
        "max_position_embeddings": 32,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": args.initializer_range,
    }
    vision = {
        "hidden_size": args.width,
        "intermediate_size": 4 * args.width,
        "num_hidden_layers": args.vision_layers,
        "num_attention_heads": args.heads,
        "image_size": ds.CANVAS_SIZE,
        "patch_size": ds.CELL_SIZE,
        "initializer_range": args.initializer_range,
    }
    return BlipConfig(text_config=text, vision_config=vision)


def to_pixels(images: np.ndarray, image_processor) -> torch.Tensor:
    """Normalise a whole batch of images at once, as the image processor does for images of the right size."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (image_processor.image_mean, image_processor.image_std))
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std


def answer_ids(tokenizer, answers):
    """Return decoder inputs `[DEC] answer [SEP]` and labels, with padding at -100."""
    ids = tokenizer(answers, padding=True, return_tensors="pt").input_ids
    ids[:, 0] = tokenizer.bos_token_id
    return ids, ids.masked_fill(ids == tokenizer.pad_token_id, -100)


def init_position_embeddings(model, config) -> None:
    """Initialise with two-dimensional sines and cosines: from noise, rows and columns take long to learn."""
    grid, quarter = ds.GRID_SIZE, config.vision_config.hidden_size // 4
    frequency = 1 / 100 ** (torch.arange(quarter) / quarter)
    angle = torch.arange(grid)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, columns = line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding[0, 1:] = 0.2 * torch.cat([rows, columns], dim=-1).flatten(
            0, 1
        )


def patch_loss(vision_model, head, processor, scenes):
    """Compute the loss of naming each patch's digit and colour (or neither) and the digit's rank from left and top.

    It stands in for the labelled images on which BLIP's vision tower is pretrained before its first caption.
    """
    states = vision_model(to_pixels(scenes.images, processor.image_processor)).last_hidden_state
    cells = torch.from_numpy(scenes.rows * ds.GRID_SIZE + scenes.columns)
    present = torch.from_numpy(scenes.digits >= 0)
    nothing = len(ds.DIGIT_NAMES) * len(ds.COLORS)
    kinds = torch.from_numpy(scenes.digits * len(ds.COLORS) + scenes.colors).where(present, nothing)
    labels = torch.full((len(scenes), states.shape[1] - 1), nothing).scatter(1, cells, kinds)
    kind_logits, *rank_logits = head(states[:, 1:]).split([nothing + 1, ds.MAX_DIGITS, ds.MAX_DIGITS], dim=-1)
    weight = torch.ones(nothing + 1)
    weight[nothing] = 0.1
    loss = torch.nn.functional.cross_entropy(kind_logits.flatten(0, 1), labels.flatten(), weight=weight)
    right = [(kind_logits.argmax(-1) == labels)[labels != nothing].float().mean()]
    for logits, place in zip(rank_logits, (scenes.columns, scenes.rows)):
        place = np.where(scenes.digits >= 0, place, ds.GRID_SIZE)
        rank = torch.from_numpy(place.argsort(axis=1).argsort(axis=1))[present]
        logits = logits.gather(1, cells.unsqueeze(-1).expand(-1, -1, ds.MAX_DIGITS))[present]
        loss = loss + torch.nn.functional.cross_entropy(logits, rank)
        right.append((logits.argmax(-1) == rank).float().mean())
    return loss, torch.stack(right)


def caption_step(model, processor, scenes, rng):
    directions = rng.choice(["left", "right", "top", "bottom"], len(scenes))
    captions = [ds.describe(scenes, i, directions[i]) for i in range(len(scenes))]
    ids, labels = answer_ids(processor.tokenizer, captions)
    labels[:, :4] = -100  # the direction is given, like a prompt
    pixels = to_pixels(scenes.images, processor.image_processor)
    return model(pixel_values=pixels, input_ids=ids, labels=labels)


def encode_images(vision_model, pixels, is_digit, rng):
    """Encode images from which a random share of the patches without a digit is dropped; the share varies per call.

    Returns the hidden states (S, L, D), the layers' attention maps and which of the L tokens are digits.
    """
    states = vision_model.embeddings(pixels)
    kept = int(rng.integers(1 + 2 * ds.MAX_DIGITS, states.shape[1] + 1))
    key = torch.from_numpy(rng.random(is_digit.shape)) + is_digit
    key[:, 0] = 2  # the class token
    order = key.topk(kept, dim=1).indices
    states = states.gather(1, order.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
    maps = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, inputs, output: maps.append(output[1]))
        for layer in vision_model.encoder.layers
    ]
    states = vision_model.post_layernorm(vision_model.encoder(inputs_embeds=states).last_hidden_state)
    for hook in hooks:
        hook.remove()
    return states, maps, is_digit.gather(1, order)


def answer_logits(model, text, image_embeds, ids):
    """Compute the decoder's logits for the answers `ids` to questions about encoded images, one for each question."""
    states = model.text_encoder(
        input_ids=text.input_ids, attention_mask=text.attention_mask, encoder_hidden_states=image_embeds
    ).last_hidden_state
    return model.text_decoder(
        input_ids=ids, encoder_hidden_states=states, encoder_attention_mask=text.attention_mask, is_decoder=True
    ).logits


def question_loss(model, processor, scenes, rng, stage):
    """Compute the loss of one question of every kind about every scene; a scene is encoded once for all questions."""
    kinds = ds.QUESTION_KINDS
    asked = [ds.ask(scenes, i, kind, rng) for i in range(len(scenes)) for kind in kinds]
    questions, answers = zip(*asked)
    text = processor.tokenizer(list(questions), padding=True, return_tensors="pt")
    ids, labels = answer_ids(processor.tokenizer, list(answers))
    pixels = to_pixels(scenes.images, processor.image_processor)
    cells = torch.from_numpy(scenes.rows * ds.GRID_SIZE + scenes.columns)
    is_digit = torch.zeros(len(scenes), ds.GRID_SIZE**2 + 1).scatter(
        1, cells + 1, torch.from_numpy(scenes.digits >= 0).float()
    )
    if stage == "thin":
        image_embeds, maps, is_digit = encode_images(model.vision_model, pixels, is_digit, rng)
    else:
        vision = model.vision_model(pixels, output_attentions=stage == "settle")
        image_embeds, maps = vision.last_hidden_state, vision.attentions
    image_embeds = image_embeds.repeat_interleave(len(kinds), dim=0)
    logits = answer_logits(model, text, image_embeds, ids)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    right = (logits[:, 0].argmax(-1) == labels[:, 1]).view(len(scenes), len(kinds)).float().mean(0)
    if stage in ("settle", "thin"):
        # In each layer the class token's attention should be spread evenly over the scene's digits.
        attended = torch.stack([layer[:, :, 0].float().mean(1) for layer in maps])
        share = is_digit / is_digit.sum(1, keepdim=True)
        missed = (share * (share.clamp(min=1e-6) / attended.clamp(min=1e-6)).log()).sum(-1).mean()
        loss = loss + 0.05 * missed
    return loss, right


def schedule(optimizer, steps):
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[g["lr"] for g in optimizer.param_groups],
        total_steps=steps,
        pct_start=0.1,
        cycle_momentum=False,
    )


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("examples/blip-vqa-digits"))
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vision_layers", type=int, default=12)
    parser.add_argument("--text_layers", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--patch_steps", type=int, default=1200)
    parser.add_argument("--caption_steps", type=int, default=1200)
    parser.add_argument("--question_steps", type=int, default=4000)
    parser.add_argument("--settle_steps", type=int, default=1000)
    parser.add_argument("--thin_steps", type=int, default=800)
    parser.add_argument(
        "--start_from",
        choices=("patch", "question", "settle", "thin"),
        default="patch",
        help="The first stage to run; a later one starts from the model in the output folder.",
    )
    parser.add_argument(
        "--plain", action="store_true", help="Leave out the last two stages, which prepare the model for pruning."
    )
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--initializer_range", type=float, default=0.08)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.plain:
        args.settle_steps = args.thin_steps = 0
    return args


def train(stage: str, parameters: list, steps: int, args, step_loss, say) -> None:
    """Train for some steps; `step_loss()` returns the loss and the values to log."""
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    scheduler = schedule(optimizer, max(steps, 1))
    for step in range(1, steps + 1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, facts = step_loss()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        if step % 50 == 0 or step < 4:
            say(stage=stage, step=step, loss=round(loss.item(), 3), **facts())


def train_captioner(config, processor, args, rng, say) -> BlipForConditionalGeneration:
    """Run the first two stages: a vision tower that labels its patches, then captioning."""
    captioner = BlipForConditionalGeneration(config)
    say(stage="caption", parameters=sum(p.numel() for p in captioner.parameters()))
    init_position_embeddings(captioner, config)
    captioner.train()
    head = torch.nn.Linear(args.width, len(ds.DIGIT_NAMES) * len(ds.COLORS) + 1 + 2 * ds.MAX_DIGITS)

    def patch():
        loss, right = patch_loss(
            captioner.vision_model, head, processor, ds.draw_scenes(args.batch_size, "train", rng)
        )
        return loss, lambda: {"accuracy": [round(r, 3) for r in right.tolist()]}

    def caption():
        return caption_step(captioner, processor, ds.draw_scenes(args.batch_size, "train", rng), rng).loss, dict

    parameters = [*captioner.vision_model.parameters(), *head.parameters()]
    train("patch", parameters, args.patch_steps, args, patch, say)
    train("caption", list(captioner.parameters()), args.caption_steps, args, caption, say)
    return captioner


def train_questions(model, stage: str, steps: int, processor, args, rng, say) -> None:
    """Run one of the later stages, on questions."""
    average = None

    def question():
        nonlocal average
        loss, right = question_loss(model, processor, ds.draw_scenes(args.batch_size, "train", rng), rng, stage)
        average = right if average is None else 0.95 * average + 0.05 * right
        return loss, lambda: {"accuracy": {k: round(a, 3) for k, a in zip(ds.QUESTION_KINDS, average.tolist())}}

    model.train()
    train(stage, list(model.parameters()), steps, args, question, say)


def main():
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    log = open(args.output_dir / "train.log", "w" if args.start_from == "patch" else "a")
    started = time.time()

    def say(**record):
        record["seconds"] = round(time.time() - started)
        print(json.dumps(record), flush=True)
        print(json.dumps(record), file=log, flush=True)

    say(args={key: value for key, value in vars(args).items() if key != "output_dir"})
    processor = build_processor()
    config = build_config(processor.tokenizer, args)
    if args.start_from == "patch":
        captioner = train_captioner(config, processor, args, rng, say)
        model = BlipForQuestionAnswering(config)
        model.vision_model.load_state_dict(captioner.vision_model.state_dict())
        model.text_decoder.load_state_dict(captioner.text_decoder.state_dict())
        model.text_encoder.load_state_dict(captioner.text_decoder.bert.state_dict())
    else:
        model = BlipForQuestionAnswering.from_pretrained(args.output_dir)

    stages = {"question": args.question_steps, "settle": args.settle_steps, "thin": args.thin_steps}
    if args.start_from in stages:
        stages = dict(list(stages.items())[list(stages).index(args.start_from) :])
    for stage, steps in stages.items():
        if steps:
            train_questions(model, stage, steps, processor, args, rng, say)
            model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)

    model.eval()
    rng = np.random.default_rng(args.seed)
    with torch.no_grad():
        right = torch.stack(
            [question_loss(model, processor, ds.draw_scenes(100, "test", rng), rng, "test")[1] for _ in range(20)]
        ).mean(0)
    say(
        stage="test",
        accuracy=round(right.mean().item(), 4),
        by_kind={k: round(a, 4) for k, a in zip(ds.QUESTION_KINDS, right.tolist())},
    )


if __name__ == "__main__":
    main()
