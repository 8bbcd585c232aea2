r"""Train the tiny dense BLIPs for visual reasoning, captioning and retrieval, from the one for question answering.

BLIP's own fine-tuned models start from a pretrained one; likewise, the vision tower and text encoder of the question
answering model are trained further here, on digit scenes newly drawn at every step. As in the last stage of
`train_dense_blip.py`, the class token is trained to attend to the digits, while patches without a digit are dropped at
random.

    python examples/train_dense_tasks.py nlvr2 --output_dir examples/blip-nlvr2-digits
    python examples/train_dense_tasks.py captioning --plain --start_from examples/blip-vqa-digits-plain \
        --output_dir outputs/blip-captioning-digits-plain

With `--plain`, nothing prepares the model for pruning.
"""

import argparse
import contextlib
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_dense_blip import answer_ids, schedule, to_pixels
from transformers import BertTokenizer, BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipProcessor
from transformers import BlipForQuestionAnswering as DenseBlip

from madtp_hf import MadtpBlipConfig
from madtp_hf.data import digit_scenes as ds
from madtp_hf.modeling.encoder import run_layers
from madtp_hf.modeling.sequences import Sequences
from madtp_hf.tasks import TASKS


NEW_WORDS = "both only neither all an of picture".split()
PROMPT = "a picture of"
NUM_QUESTIONS = 3  # about each pair of scenes
# Token counts after random dropping; only a few, since a CPU's kernels are prepared again for each shape.
NUM_TOKENS = (11, 21, 31, 41, 61, 81, 101)
# The classes to save: transformers' own model where it has one.
DENSE = {"captioning": BlipForConditionalGeneration, "retrieval": BlipForImageTextRetrieval}


def extend_processor(processor: BlipProcessor) -> BlipProcessor:
    """Add the further words of statements and captions to the processor's vocabulary."""
    words = sorted(processor.tokenizer.get_vocab(), key=processor.tokenizer.get_vocab().get)
    special = words[-2:]  # [DEC] and [ENC] stay last
    vocab = [*words[:-2], *(word for word in NEW_WORDS if word not in words), *special]
    tokenizer = BertTokenizer(
        vocab={word: index for index, word in enumerate(vocab)},
        bos_token="[DEC]",
        additional_special_tokens=["[ENC]"],
        model_max_length=32,
    )
    return BlipProcessor(processor.image_processor, tokenizer)


def start_from(path, task: str):
    """Build the task's model, with pruning off, and its processor from the question answering model at `path`.

    Also returns that model's decoder and tokenizer.
    """
    trained = DenseBlip.from_pretrained(path)
    old = BlipProcessor.from_pretrained(path)
    processor = extend_processor(old)
    tokenizer = processor.tokenizer
    fields = trained.config.to_dict()
    fields.pop("model_type")
    fields["text_config"].update(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id)
    fields["image_text_hidden_size"] = 64
    # As in the original BLIP, a text with cross-attention to an image begins with [ENC].
    config = MadtpBlipConfig(**fields, encoder_token_id=tokenizer.convert_tokens_to_ids("[ENC]"))
    model = TASKS[task].model_class(config)

    weights = {f"vision_model.{name}": tensor for name, tensor in trained.vision_model.state_dict().items()}
    for stack in ("text_decoder.bert", "text_encoder"):
        weights |= {f"{stack}.{name}": tensor for name, tensor in trained.text_encoder.state_dict().items()}
    weights |= {f"text_decoder.cls.{name}": t for name, t in trained.text_decoder.cls.state_dict().items()}
    known = torch.tensor([old.tokenizer.convert_tokens_to_ids(word) for word in tokenizer.get_vocab()])
    places = torch.tensor(list(tokenizer.get_vocab().values()))
    known, places = (ids[known != old.tokenizer.unk_token_id] for ids in (known, places))
    expected = model.state_dict()
    for name, tensor in list(weights.items()):
        if name.endswith("word_embeddings.weight") or "predictions.bias" in name or "predictions.decoder" in name:
            if name in expected:
                weights[name] = expected[name].clone()
                weights[name][places] = tensor[known]
    if task == "nlvr2":
        weights = model._from_dense_weights(weights)
    weights = {name: tensor for name, tensor in weights.items() if name in expected}
    model.load_state_dict(weights, strict=False)
    return model, processor, (trained.text_decoder, old.tokenizer)


def encode_images(vision_model, pixels, is_digit, num_tokens, rng):
    """Encode images from which patches without a digit are dropped at random, down to one of `num_tokens`.

    Returns the tower's output, L tokens for each image, and how far the class token's attention is from the scene's
    digits, averaged over layers.
    """
    states = vision_model.embeddings(pixels)
    kept = int(rng.choice(num_tokens))
    key = torch.from_numpy(rng.random(is_digit.shape)) + is_digit
    key[:, 0] = 2  # the class token
    order = key.topk(kept, dim=1).indices
    states = states.gather(1, order.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
    digits = is_digit.gather(1, order)
    share = digits / digits.sum(1, keepdim=True)
    missed = []

    def look(module, inputs, output):
        heads = vision_model.encoder.layers[0].self_attn.num_heads
        query, keys, _ = sequences.pad(output.float()).unflatten(-1, (3 * heads, -1)).transpose(1, 2).chunk(3, 1)
        attended = (query[:, :, :1] @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).mean(1).squeeze(1)
        missed.append((share * (share.clamp(min=1e-6) / attended.clamp(min=1e-6)).log()).sum(-1).mean())

    sequences = Sequences.padded(*states.shape[:2], states.device)
    hooks = [layer.self_attn.qkv.register_forward_hook(look) for layer in vision_model.encoder.layers]
    output = run_layers(vision_model.encoder.layers, states.flatten(0, 1), sequences, "sdpa")
    for hook in hooks:
        hook.remove()
    return output._replace(states=vision_model.post_layernorm(output.states)), torch.stack(missed).mean()


def digit_patches(scenes) -> torch.Tensor:
    cells = torch.from_numpy(scenes.rows * ds.GRID_SIZE + scenes.columns)
    return torch.zeros(len(scenes), ds.GRID_SIZE**2 + 1).scatter(
        1, cells + 1, torch.from_numpy(scenes.digits >= 0).float()
    )


def statement_loss(model, processor, args, rng, answerer):
    """Compute the loss of statements of every kind about every pair of scenes, and of a few questions.

    A pair is encoded once for all of them. A statement's truth is one bit, too little to learn from scratch what the
    words refer to. The questions ("left image: how many sevens are there?") are answered from the same hidden states
    by the question answering model's decoder, which is discarded after training.
    """
    batch_size = args.batch_size
    pairs = ds.draw_pairs(batch_size, "train", rng)
    kinds = ds.STATEMENT_KINDS
    texts, labels, answers = [], [], []
    for i in range(batch_size):
        for kind in kinds:
            sentence, truth = ds.state(*pairs, i, kind, rng)
            texts.append(sentence)
            labels.append(int(truth))
        for kind in rng.permutation(ds.QUESTION_KINDS)[:NUM_QUESTIONS]:
            side = rng.integers(2)
            question, answer = ds.ask(pairs[side], i, kind, rng)
            texts.append(f"{('left', 'right')[side]} image: {question}")
            answers.append(answer)
    text = processor.tokenizer(texts, padding=True, pad_to_multiple_of=8, return_tensors="pt")
    labels = torch.tensor(labels)
    pixels = torch.cat([to_pixels(scenes.images, processor.image_processor) for scenes in pairs])
    is_digit = torch.cat([digit_patches(scenes) for scenes in pairs])
    images, missed = encode_images(model.vision_model, pixels, is_digit, args.num_tokens, rng)
    each = len(kinds) + NUM_QUESTIONS
    sides = []
    for half in images.hidden_states.chunk(2):
        states = half.repeat_interleave(each, dim=0)
        sides += [states.flatten(0, 1), Sequences.padded(*states.shape[:2], states.device)]
    read = model._encode_text(text.input_ids, text.attention_mask, *sides).hidden_states
    stated, asked = read.unflatten(0, (batch_size, each)).split([len(kinds), NUM_QUESTIONS], dim=1)
    logits = model.cls_head(stated.flatten(0, 1)[:, 0])
    right_ones = (logits.argmax(-1) == labels).view(batch_size, len(kinds)).float().mean(0)

    decoder, tokenizer = answerer
    ids, targets = answer_ids(tokenizer, answers)
    mask = text.attention_mask.unflatten(0, (batch_size, each))[:, len(kinds) :].flatten(0, 1)
    scores = decoder(input_ids=ids, encoder_hidden_states=asked.flatten(0, 1), encoder_attention_mask=mask).logits
    answering = F.cross_entropy(scores[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)
    answered = (scores[:, 0].argmax(-1) == targets[:, 1]).float().mean().item()
    found = dict(zip(kinds, right_ones.tolist())) | {"answers": answered}
    return F.cross_entropy(logits, labels) + answering, missed, found


def caption_loss(model, processor, args, rng, answerer):
    """Compute the loss of all four captions of every scene."""
    scenes = ds.draw_scenes(args.batch_size, "train", rng)
    captions = [f"{PROMPT} {c}" for i in range(args.batch_size) for c in ds.describe_from_all_sides(scenes, i)]
    ids, labels = answer_ids(processor.tokenizer, captions)
    labels[:, : 1 + len(PROMPT.split())] = -100
    pixels = to_pixels(scenes.images, processor.image_processor)
    images, missed = encode_images(model.vision_model, pixels, digit_patches(scenes), args.num_tokens, rng)
    states = images.hidden_states
    logits = model.text_decoder(input_ids=ids, encoder_hidden_states=states.repeat_interleave(4, dim=0)).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    # The word after "digits from the" can't be predicted; those after it can.
    counted = labels[:, 1:] != -100
    counted[:, : 3 + len(PROMPT.split())] = False
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:])[counted].float().mean()
    return loss, missed, {"words": right.item()}


def retrieval_loss(model, processor, args, rng, answerer):
    """Compute the contrastive loss of one caption per scene, and the matching loss with it and hard negatives."""
    from madtp_hf.modeling.retrieval_loss import contrastive_loss

    batch_size = args.batch_size
    scenes = ds.draw_scenes(batch_size, "train", rng)
    sides = rng.integers(0, 4, batch_size)
    captions = [ds.describe_from_all_sides(scenes, i)[side] for i, side in enumerate(sides)]
    text = processor.tokenizer(captions, padding=True, pad_to_multiple_of=8, return_tensors="pt")
    pixels = to_pixels(scenes.images, processor.image_processor)
    images, missed = encode_images(model.vision_model, pixels, digit_patches(scenes), args.num_tokens, rng)
    ids = torch.arange(batch_size)
    alone = model._encode_text(text.input_ids, text.attention_mask)
    image_feature, text_feature = model._image_feature(images), model._text_feature(alone)
    contrast = contrastive_loss(image_feature, text_feature, ids, None)
    positive = model._encode_text(text.input_ids, text.attention_mask, images.states, images.sequences)
    negative = model._score_hard_negatives(
        text.input_ids, text.attention_mask, images, None, image_feature, text_feature, ids, 0.07
    )
    scores = torch.cat([model.itm_head(positive.first_states), negative])
    labels = (torch.arange(len(scores)) < batch_size).long()
    found = ((image_feature @ text_feature.T).argmax(1) == ids).float().mean().item()
    matched = (scores.argmax(-1) == labels).float().mean().item()
    return contrast + F.cross_entropy(scores, labels), missed, {"found": found, "matched": matched}


LOSSES = {"nlvr2": statement_loss, "captioning": caption_loss, "retrieval": retrieval_loss}


def save(model, processor, task: str, folder) -> None:
    """Save transformers' own dense model if it has one for the task, in half precision, as for large checkpoints."""
    processor.tokenizer.backend_tokenizer.no_padding()  # undo the padding that training has set
    processor.save_pretrained(folder)
    if task in DENSE:
        # `encoder_token_id` stays in the configuration, so that `from_blip` takes it over.
        ours = ("model_type", "auto_map", "architectures")
        fields = {name: value for name, value in model.config.to_dict().items() if name not in ours}
        dense = DENSE[task](DenseBlip.config_class(**fields))
        weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("alignment.")}
        dense.load_state_dict(weights)
    else:
        dense = model
    dense.half().save_pretrained(folder)
    # The installed package loads our classes: the folder holds no code, so its configuration must not refer to any.
    for code in Path(folder).glob("*.py"):
        code.unlink()
    path = Path(folder, "config.json")
    fields = json.loads(path.read_text())
    fields.pop("auto_map", None)
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def opened_log(args):
    """Yield a function that prints a record and writes it to the output folder's train.log, after the arguments."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    started = time.time()
    with open(args.output_dir / "train.log", "w") as log:

        def say(**record):
            record["seconds"] = round(time.time() - started)
            print(json.dumps(record), flush=True)
            print(json.dumps(record), file=log, flush=True)

        say(args={key: str(value) for key, value in vars(args).items() if key not in ("output_dir", "start_from")})
        yield say


def train(parameters: list, draw_loss, args, say) -> None:
    """Train for `args.steps` steps.

    `draw_loss()` returns a new batch's loss, how far the class token's attention is from the digits, and the accuracy.
    """
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    scheduler = schedule(optimizer, args.steps)
    average = None
    for step in range(1, args.steps + 1):
        with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss, missed, right = draw_loss()
        optimizer.zero_grad(set_to_none=True)
        (loss + args.guidance * missed).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        average = right if average is None else {k: 0.95 * average[k] + 0.05 * right[k] for k in right}
        if step % 50 == 0 or step < 4:
            accuracy = {kind: round(value, 3) for kind, value in average.items()}
            say(step=step, loss=round(loss.item(), 3), missed=round(missed.item(), 3), accuracy=accuracy)


def make_parser(description: str, start: str, batch_size: int):
    """Return a parser with the options of training; `start` names the model in examples/ to start from."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--start_from", type=Path, default=Path("examples", start))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=batch_size)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument(
        "--guidance", type=float, default=0.05, help="Weight of the loss that makes the class token attend to digits."
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="Don't prepare the model for pruning: all patches stay, no guidance. Start from a plain model as well.",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser


def parse_arguments(parser):
    args = parser.parse_args()
    args.num_tokens = NUM_TOKENS[-1:] if args.plain else NUM_TOKENS
    args.guidance = 0.0 if args.plain else args.guidance
    return args


def main():
    parser = make_parser(__doc__, start="blip-vqa-digits", batch_size=48)
    parser.add_argument("task", choices=LOSSES)
    args = parse_arguments(parser)

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng([args.seed, 7])
    with opened_log(args) as say:
        model, processor, answerer = start_from(args.start_from, args.task)
        model.train()
        answerer[0].train()
        train(
            [*model.parameters(), *answerer[0].parameters()],
            lambda: LOSSES[args.task](model, processor, args, rng, answerer),
            args,
            say,
        )
        save(model, processor, args.task, args.output_dir)
        say(parameters=sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    main()
