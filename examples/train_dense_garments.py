"""Train small dense models on photographs of garments, on a CPU: a BLIP that answers questions, and a CLIP.

Nothing prepares them for pruning: no patch is dropped by its content, no attention is guided. As BLIP's and CLIP's own
towers, the vision tower first learns from labelled images, its class token naming the garment; patches are dropped at
random meanwhile, as in FLIP (arXiv 2212.00794), which is for speed. Then BLIP learns questions, and CLIP captions.
The tower starts from `blip-vqa-digits-plain`.

    python examples/train_dense_garments.py --photographs FOLDER --output_dir outputs/garments

FOLDER: see garments.py. Validation photographs choose nothing here; they and the test's are never trained on.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from garments import CAPTIONS, GARMENTS, IS_IT, WHAT, ask, load_garments
from train_dense_blip import answer_ids, answer_logits, schedule, to_pixels
from train_dense_clip import build_model, build_processor, copy_tower
from transformers import BertTokenizer, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor


SIZE = 96  # pixels; 12 x 12 patches
SOURCE_SIZE = 128  # of the photographs that crops are taken from
MAX_LENGTH = 16
NUM_MERGES = 100  # more than the captions' words need
NAMES = list(GARMENTS.values())


# Photographs


def decode(folder, split: str, size: int) -> tuple[np.ndarray, torch.Tensor]:
    """Return a split's photographs (n, size, size, 3) uint8, squeezed to a square as BLIP does, and labels (n,)."""
    rows = load_garments(folder, split)
    images = np.stack([np.asarray(image.convert("RGB").resize((size, size), 3)) for image in rows["image"]])
    return images, torch.tensor([NAMES.index(label) for label in rows["label"]])


def augment(pixels: torch.Tensor, generator) -> torch.Tensor:
    """Crop and flip images (B, 3, H, W) at random, and change their contrast and colours; returns SIZE x SIZE."""
    n = len(pixels)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    scale, angle = uniform(0.65, 1.0), uniform(-0.15, 0.15)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    shift = uniform(-1, 1, 2) * (1 - scale)[:, None]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack(
        [torch.stack([cos * flip, -sin, shift[:, 0]], 1), torch.stack([sin * flip, cos, shift[:, 1]], 1)], 1
    )
    grid = F.affine_grid(rows, [n, 3, SIZE, SIZE], align_corners=False)
    pixels = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return pixels * uniform(0.7, 1.3, 1, 1, 1) + uniform(-0.3, 0.3, 3, 1, 1)


class Photographs:
    """Batches of augmented training photographs, over and over."""

    def __init__(self, folder, image_processor, batch_size: int, seed: int):
        self.images, self.labels = decode(folder, "train", SOURCE_SIZE)
        self.image_processor, self.batch_size = image_processor, batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long)

    def draw(self):
        """Return pixel_values (B, 3, SIZE, SIZE) and labels (B,)."""
        if len(self.order) < self.batch_size:
            self.order = torch.randperm(len(self.images), generator=self.generator)
        chosen, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        return augment(to_pixels(self.images[chosen.numpy()], self.image_processor), self.generator), self.labels[
            chosen
        ]


# Models


def build_blip(start):
    """Build a BLIP for questions about garments, and its processor, from the one at `start`.

    Its words are new, and its positions are those of a larger image, interpolated.
    """
    words = " ".join((*WHAT, *IS_IT, *CAPTIONS)).replace("{}", " ").replace("?", " ? ").split()
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*words, *NAMES, "yes", "no"])]
    vocab += ["[DEC]", "[ENC]"]
    tokenizer = BertTokenizer(
        vocab={word: index for index, word in enumerate(vocab)},
        bos_token="[DEC]",
        additional_special_tokens=["[ENC]"],
        model_max_length=MAX_LENGTH,
    )
    processor = BlipProcessor(BlipImageProcessor(size={"height": SIZE, "width": SIZE}), tokenizer)
    trained = BlipForQuestionAnswering.from_pretrained(start).float()
    config = trained.config
    config.vision_config.image_size = SIZE
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.bos_token_id = tokenizer.bos_token_id
    model = BlipForQuestionAnswering(config)
    weights, expected = trained.state_dict(), model.state_dict()
    name = "vision_model.embeddings.position_embedding"
    side = int((weights[name].shape[1] - 1) ** 0.5)
    grid = weights[name][:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(SIZE // 8, SIZE // 8), mode="bicubic").flatten(2).transpose(1, 2)
    weights[name] = torch.cat([weights[name][:, :1], grid], dim=1)
    model.load_state_dict({k: v if v.shape == expected[k].shape else expected[k] for k, v in weights.items()})
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model, processor


def build_clip(blip: BlipForQuestionAnswering):
    """Build a CLIP with the vision tower of `blip`, and a new text tower and vocabulary; returns its processor too."""
    texts = [caption.format(name) for caption in CAPTIONS for name in NAMES]
    processor = build_processor(texts, SIZE, NUM_MERGES, MAX_LENGTH, do_center_crop=False)
    model = build_model(blip, processor, projection_dim=64, hidden_act=blip.config.vision_config.hidden_act)
    copy_tower(blip, model)
    with torch.no_grad():  # BLIP has no norm here: hidden states keep about the same scale
        model.vision_model.pre_layrnorm.weight.fill_(
            2 * model.vision_model.embeddings.position_embedding.weight[1:].std()
        )
    return model, processor


def encode(vision_model, pixels, kept: int | None):
    """Return the tower's states (B, L, D) of images of which `kept` random patches are left, all with None."""
    states = vision_model.embeddings(pixels)
    if kept is not None:
        key = torch.rand(states.shape[:2])
        key[:, 0] = 2  # the class token
        order = key.topk(kept + 1, dim=1).indices
        states = states.gather(1, order.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
    if hasattr(vision_model, "pre_layrnorm"):
        states = vision_model.pre_layrnorm(states)
    return vision_model.post_layernorm(vision_model.encoder(inputs_embeds=states).last_hidden_state)


# Training


def label_loss(blip, head, photographs, kept):
    pixels, labels = photographs.draw()
    logits = head(encode(blip.vision_model, pixels, kept)[:, 0])
    return F.cross_entropy(logits.float(), labels, label_smoothing=0.1), (logits.argmax(-1) == labels)


def question_loss(blip, processor, photographs, rng):
    """Compute the loss of two questions about each photograph, one of each kind."""
    pixels, labels = photographs.draw()
    asked = [ask(NAMES[label], kind, rng) for label in labels.tolist() for kind in ("what", "is it")]
    questions, answers = zip(*asked)
    text = processor.tokenizer(list(questions), padding=True, return_tensors="pt")
    ids, targets = answer_ids(processor.tokenizer, list(answers))
    image_embeds = encode(blip.vision_model, pixels, None).repeat_interleave(2, dim=0)
    logits = answer_logits(blip, text, image_embeds, ids)
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten(), ignore_index=-100, label_smoothing=0.1
    )
    return loss, (logits[:, 0].argmax(-1) == targets[:, 1])


def caption_loss(clip, processor, photographs, rng):
    """Compute CLIP's loss of photographs of different garments, drawn from a batch, and a caption of each."""
    pixels, labels = photographs.draw()
    captions = [str(rng.choice(CAPTIONS)).format(name) for name in NAMES]
    text = processor.tokenizer(captions, padding=True, return_tensors="pt")
    images = clip.visual_projection(encode(clip.vision_model, pixels, None)[:, 0])
    texts = clip.get_text_features(**text).pooler_output
    images, texts = (F.normalize(features.float(), dim=-1) for features in (images, texts))
    logits = images @ texts.T * clip.logit_scale.exp().clamp(max=30)
    return F.cross_entropy(logits, labels, label_smoothing=0.1), (logits.argmax(-1) == labels)


def train(stage: str, parameters: list, learning_rate: float, args, step_loss, say, evaluate) -> None:
    """Train for the stage's steps; `step_loss()` returns the loss and which predictions were right."""
    steps = getattr(args, f"{stage}_steps")
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.1, betas=(0.9, 0.98))
    scheduler, right = schedule(optimizer, max(steps, 1)), []
    for step in range(1, steps + 1):
        loss, hits = step_loss()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        right.append(hits.float().mean().item())
        if step % 100 == 0 or step == steps:
            say(stage=stage, step=step, loss=round(loss.item(), 3), training=round(float(np.mean(right[-100:])), 3))
        if step % 500 == 0 or step == steps:
            say(stage=stage, step=step, **evaluate())


def save(model, processor, folder: Path) -> None:
    processor.tokenizer.backend_tokenizer.no_padding()  # undo the padding that training has set
    processor.save_pretrained(folder)
    model.half().save_pretrained(folder)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True, help="The data set's folder.")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="The folder to write blip-vqa-garments and clip-garments to."
    )
    parser.add_argument("--start_from", type=Path, default=Path(__file__).parent / "blip-vqa-digits-plain")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--label_steps", type=int, default=3000)
    parser.add_argument("--question_steps", type=int, default=500)
    parser.add_argument("--caption_steps", type=int, default=400)
    parser.add_argument("--kept_patches", type=int, default=48, help="Patches kept, of 144, while labels are learned.")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


class Validation:
    """The share of validation photographs whose garment a model names."""

    def __init__(self, folder, image_processor):
        images, self.labels = decode(folder, "validation", SIZE)
        self.pixels = to_pixels(images, image_processor)

    def share(self, named: torch.Tensor) -> dict:
        return {"validation": round((named == self.labels).float().mean().item(), 3)}

    @torch.no_grad()
    def by_head(self, blip, head):
        return self.share(head(encode(blip.vision_model, self.pixels, None)[:, 0]).argmax(-1))

    def by_answer(self, blip, tokenizer):
        text = tokenizer([WHAT[0]] * len(self.labels), return_tensors="pt")
        written = blip.generate(text.input_ids, self.pixels, text.attention_mask, max_new_tokens=3)
        answers = tokenizer.batch_decode(written, skip_special_tokens=True)
        return self.share(torch.tensor([NAMES.index(answer) if answer in NAMES else -1 for answer in answers]))

    @torch.no_grad()
    def by_caption(self, clip, tokenizer):
        text = tokenizer([CAPTIONS[0].format(name) for name in NAMES], padding=True, return_tensors="pt")
        return self.share(clip(pixel_values=self.pixels, **text).logits_per_image.argmax(-1))


def main():
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng, started = np.random.default_rng(args.seed), time.time()
    folders = {name: args.output_dir / f"{name}-garments" for name in ("blip-vqa", "clip")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    log = open(folders["blip-vqa"] / "train.log", "w")

    def say(**record):
        record["seconds"] = round(time.time() - started)
        print(json.dumps(record), flush=True)
        print(json.dumps(record), file=log, flush=True)

    say(args={key: value for key, value in vars(args).items() if not isinstance(value, Path)})
    blip, processor = build_blip(args.start_from)
    photographs = Photographs(args.photographs, processor.image_processor, args.batch_size, args.seed)
    validation = Validation(args.photographs, processor.image_processor)
    head = torch.nn.Linear(blip.config.vision_config.hidden_size, len(NAMES))

    def run(stage, parameters, learning_rate, loss, evaluate):
        train(stage, list(parameters), learning_rate, args, loss, say, evaluate)

    run(
        "label",
        [*blip.vision_model.parameters(), *head.parameters()],
        args.learning_rate,
        lambda: label_loss(blip, head, photographs, args.kept_patches),
        lambda: validation.by_head(blip, head),
    )
    clip, clip_processor = build_clip(blip)
    run(
        "question",
        blip.parameters(),
        args.learning_rate / 3,
        lambda: question_loss(blip, processor, photographs, rng),
        lambda: validation.by_answer(blip, processor.tokenizer),
    )
    save(blip, processor, folders["blip-vqa"])
    run(
        "caption",
        clip.parameters(),
        args.learning_rate / 3,
        lambda: caption_loss(clip, clip_processor, photographs, rng),
        lambda: validation.by_caption(clip, clip_processor.tokenizer),
    )
    save(clip, clip_processor, folders["clip"])


if __name__ == "__main__":
    main()
