"""Train the tiny dense BLIP that the examples prune: digit scenes, from scratch, on a CPU.

As BLIP itself was trained: first to caption scenes, then to answer questions about them, the question encoder and the answer
decoder both starting from the caption decoder. Scenes are drawn afresh at every step. Each stage is a plain loop.

    python examples/train_dense_blip.py --output_dir examples/blip-vqa-digits
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


def build_processor(folder: Path) -> BlipProcessor:
    """A BLIP processor with a word-piece vocabulary of just the words that the scenes' questions, answers and captions use."""
    words = (
        "is there a does the image show how many are what number of in which digit color have next first from".split()
    )
    words += "leftmost rightmost topmost bottommost left right top bottom above below pair pairs has more than than same no yes".split()
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
    """What the image processor does to images of the right size, on a whole batch at once."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (image_processor.image_mean, image_processor.image_std))
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std


def answer_ids(tokenizer, answers):
    """Decoder inputs `[DEC] answer [SEP]` and labels, padding at -100."""
    ids = tokenizer(answers, padding=True, return_tensors="pt").input_ids
    ids[:, 0] = tokenizer.bos_token_id
    return ids, ids.masked_fill(ids == tokenizer.pad_token_id, -100)


def init_position_embeddings(model, config) -> None:
    """Start from two-dimensional sines and cosines: from noise, telling the rows and columns apart takes long to learn."""
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
    """Name each patch's digit and colour, or neither, and where the digit ranks from the left and from the top.

    BLIP's vision tower has seen a million labelled images before its first caption; this is its tiny sibling's share.
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


def caption_step(model, processor, scenes, rng, device):
    directions = rng.choice(["left", "right", "top", "bottom"], len(scenes))
    captions = [ds.describe(scenes, i, directions[i]) for i in range(len(scenes))]
    ids, labels = answer_ids(processor.tokenizer, captions)
    labels[:, :4] = -100  # the direction is given, as a prompt is
    pixels = to_pixels(scenes.images, processor.image_processor)
    return model(pixel_values=pixels, input_ids=ids, labels=labels)


def question_loss(model, processor, scenes, rng, kinds):
    """One question of every kind about every scene; a scene is encoded once for all its questions."""
    asked = [ds.ask(scenes, i, kind, rng) for i in range(len(scenes)) for kind in kinds]
    questions, answers = zip(*asked)
    text = processor.tokenizer(list(questions), padding=True, return_tensors="pt")
    ids, labels = answer_ids(processor.tokenizer, list(answers))
    image_embeds = model.vision_model(to_pixels(scenes.images, processor.image_processor)).last_hidden_state
    image_embeds = image_embeds.repeat_interleave(len(kinds), dim=0)
    states = model.text_encoder(
        input_ids=text.input_ids, attention_mask=text.attention_mask, encoder_hidden_states=image_embeds
    ).last_hidden_state
    logits = model.text_decoder(
        input_ids=ids, encoder_hidden_states=states, encoder_attention_mask=text.attention_mask, is_decoder=True
    ).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    right = (logits[:, 0].argmax(-1) == labels[:, 1]).view(len(scenes), len(kinds)).float().mean(0)
    return loss, right


def schedule(optimizer, steps):
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[g["lr"] for g in optimizer.param_groups],
        total_steps=steps,
        pct_start=0.1,
        cycle_momentum=False,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("examples/blip-vqa-digits"))
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vision_layers", type=int, default=12)
    parser.add_argument("--text_layers", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--patch_steps", type=int, default=600)
    parser.add_argument("--caption_steps", type=int, default=1500)
    parser.add_argument("--question_steps", type=int, default=2000)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--initializer_range", type=float, default=0.08)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    log = open(args.output_dir / "train.log", "a")
    started = time.time()

    def say(**record):
        record["seconds"] = round(time.time() - started)
        print(json.dumps(record), flush=True)
        print(json.dumps(record), file=log, flush=True)

    say(args={k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()})
    processor = build_processor(args.output_dir)
    config = build_config(processor.tokenizer, args)

    captioner = BlipForConditionalGeneration(config)
    say(stage="caption", parameters=sum(p.numel() for p in captioner.parameters()))
    init_position_embeddings(captioner, config)
    captioner.train()
    head = torch.nn.Linear(args.width, len(ds.DIGIT_NAMES) * len(ds.COLORS) + 1 + 2 * ds.MAX_DIGITS)
    parameters = [*captioner.vision_model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    scheduler = schedule(optimizer, max(args.patch_steps, 1))
    for step in range(1, args.patch_steps + 1):
        scenes = ds.draw_scenes(args.batch_size, "train", rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, right = patch_loss(captioner.vision_model, head, processor, scenes)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        if step % 50 == 0 or step < 4:
            say(stage="patch", step=step, loss=round(loss.item(), 3), accuracy=[round(r, 3) for r in right.tolist()])

    optimizer = torch.optim.AdamW(captioner.parameters(), lr=args.learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    scheduler = schedule(optimizer, max(args.caption_steps, 1))
    for step in range(1, args.caption_steps + 1):
        scenes = ds.draw_scenes(args.batch_size, "train", rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = caption_step(captioner, processor, scenes, rng, "cpu").loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(captioner.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 50 == 0 or step < 4:
            say(stage="caption", step=step, loss=round(loss.item(), 3))
    captioner.save_pretrained(args.output_dir / "caption")

    model = BlipForQuestionAnswering(config)
    model.vision_model.load_state_dict(captioner.vision_model.state_dict())
    model.text_decoder.load_state_dict(captioner.text_decoder.state_dict())
    model.text_encoder.load_state_dict(captioner.text_decoder.bert.state_dict())
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    scheduler = schedule(optimizer, args.question_steps)
    average = None
    for step in range(1, args.question_steps + 1):
        scenes = ds.draw_scenes(args.batch_size, "train", rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, right = question_loss(model, processor, scenes, rng, ds.QUESTION_KINDS)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        average = right if average is None else 0.95 * average + 0.05 * right
        if step % 50 == 0 or step < 4:
            say(
                stage="question",
                step=step,
                loss=round(loss.item(), 3),
                accuracy={k: round(a, 3) for k, a in zip(ds.QUESTION_KINDS, average.tolist())},
            )
        if step % 500 == 0:
            model.save_pretrained(args.output_dir)
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)

    model.eval()
    rng = np.random.default_rng(args.seed)
    with torch.no_grad():
        right = torch.stack(
            [
                question_loss(model, processor, ds.draw_scenes(100, "test", rng), rng, ds.QUESTION_KINDS)[1]
                for _ in range(20)
            ]
        ).mean(0)
    say(
        stage="test",
        accuracy=round(right.mean().item(), 4),
        by_kind={k: round(a, 4) for k, a in zip(ds.QUESTION_KINDS, right.tolist())},
    )


if __name__ == "__main__":
    main()
