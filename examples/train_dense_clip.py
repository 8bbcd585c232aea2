"""Train the tiny dense CLIP that the examples prune: on digit scenes and their captions, on a CPU.

The image tower starts from that of the BLIP for retrieval. The text tower, causal as in CLIP, starts from scratch, as
does the vocabulary, whose byte pairs build the captions' words. Scenes are newly drawn at every step. As in
`train_dense_tasks.py`, the class token is trained to attend to the digits, while patches without a digit are dropped
at random.

    python examples/train_dense_clip.py --output_dir examples/clip-digits
"""

import json

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from train_dense_blip import to_pixels
from train_dense_tasks import digit_patches, make_parser, opened_log, parse_arguments, train
from transformers import (
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
)
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from madtp_hf.data import digit_scenes as ds


MAX_LENGTH = 32
NUM_MERGES = 150  # more than the captions' words need


def build_processor(texts: list[str], image_size: int, num_merges: int, max_length: int, **options) -> CLIPProcessor:
    """Build CLIP's image processor and a tokenizer of all bytes and the texts' pairs; special tokens come last.

    image_size: in pixels; options: the image processor's.
    """
    letters = sorted(ByteLevel.alphabet())
    trained = CLIPTokenizer().backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=2 * len(letters) + num_merges,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    words = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters), *learned])
    words = [word for word in words if not word.startswith("<|")] + ["<|startoftext|>", "<|endoftext|>"]
    merges = json.loads(trained.to_str())["model"]["merges"]
    tokenizer = CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[tuple(pair) for pair in merges],
        model_max_length=max_length,
    )
    square = {"height": image_size, "width": image_size}
    return CLIPProcessor(CLIPImageProcessor(**{"size": square, "crop_size": square, **options}), tokenizer)


def build_model(blip, processor: CLIPProcessor, projection_dim: int, **options) -> CLIPModel:
    """Build a CLIP with as many layers as a BLIP, of the same sizes; options: the image tower's."""
    tower, tokenizer = blip.config.vision_config, processor.tokenizer
    sizes = {name: getattr(tower, name) for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"num_hidden_layers": blip.config.text_config.num_hidden_layers, "vocab_size": len(tokenizer)}
    text |= {"max_position_embeddings": tokenizer.model_max_length, **tokens}
    vision = {name: getattr(tower, name) for name in ("num_hidden_layers", "image_size", "patch_size")}
    return CLIPModel(
        CLIPConfig(
            text_config={**sizes, **text}, vision_config={**sizes, **vision, **options}, projection_dim=projection_dim
        )
    )


@torch.no_grad()
def copy_tower(blip, model: CLIPModel) -> None:
    """Give a CLIP the image tower of a BLIP, all but the norm before the layers, which BLIP lacks."""
    weights = {}
    for name, tensor in blip.vision_model.state_dict().items():
        if ".qkv." in name:
            weights |= {name.replace("qkv", f"{kind}_proj"): part for kind, part in zip("qkv", tensor.chunk(3))}
        else:
            weights[name.replace("self_attn.projection", "self_attn.out_proj")] = tensor.clone()
    # CLIP's patch embedding has no bias: add it to the position embeddings.
    positions = weights.pop("embeddings.position_embedding")[0]
    positions[1:] += weights.pop("embeddings.patch_embedding.bias")
    weights["embeddings.position_embedding.weight"] = positions
    weights["embeddings.class_embedding"] = weights["embeddings.class_embedding"].flatten()
    missing, unexpected = model.vision_model.load_state_dict(weights, strict=False)
    assert not unexpected and all("pre_layrnorm" in name for name in missing), (missing, unexpected)


def start_from(path) -> tuple[CLIPModel, CLIPProcessor]:
    """Build a CLIP whose image tower has the weights of the BLIP at `path`, and its processor."""
    scenes = ds.draw_scenes(512, "train", np.random.default_rng(0))
    captions = [caption for i in range(len(scenes)) for caption in ds.describe_from_all_sides(scenes, i)]
    size = {"shortest_edge": ds.CANVAS_SIZE}
    processor = build_processor(captions, ds.CANVAS_SIZE, NUM_MERGES, MAX_LENGTH, size=size)
    blip = BlipForImageTextRetrieval.from_pretrained(path).float()
    model = build_model(blip, processor, blip.config.image_text_hidden_size)
    scenes = ds.draw_scenes(8, "train", np.random.default_rng(0))
    copy_tower(blip, model)
    with torch.no_grad():
        # BLIP has no norm here: initialise this one so that hidden states keep about the same scale.
        states = model.vision_model.embeddings(to_pixels(scenes.images, processor.image_processor))
        model.vision_model.pre_layrnorm.weight.fill_(states.std(dim=-1).mean())
        model.visual_projection.weight.copy_(blip.vision_proj.weight)
    model.set_attn_implementation({"vision_config": "eager"})  # training reads the attention maps
    return model, processor


def encode_images(model: CLIPModel, pixels, is_digit, num_tokens, rng):
    """Return image features (S, E), computed while patches without a digit are dropped at random.

    Also returns how far the class token's attention is from the scene's digits, averaged over layers.
    """
    tower, maps = model.vision_model, []
    states = tower.embeddings(pixels)
    kept = int(rng.choice(num_tokens))
    key = torch.from_numpy(rng.random(is_digit.shape)) + is_digit
    key[:, 0] = 2  # the class token
    order = key.topk(kept, dim=1).indices
    states = tower.pre_layrnorm(states.gather(1, order.unsqueeze(-1).expand(-1, -1, states.shape[-1])))
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, inputs, output: maps.append(output[1]))
        for layer in tower.encoder.layers
    ]
    states = tower.encoder(inputs_embeds=states).last_hidden_state
    for hook in hooks:
        hook.remove()
    digits = is_digit.gather(1, order)
    share = digits / digits.sum(1, keepdim=True)
    attended = torch.stack([of_layer[:, :, 0].float().mean(1) for of_layer in maps])
    missed = (share * (share.clamp(min=1e-6) / attended.clamp(min=1e-6)).log()).sum(-1).mean()
    return model.visual_projection(tower.post_layernorm(states[:, 0])), missed


def pair_loss(model, processor, args, rng):
    """Compute the contrastive loss of one caption per scene against those of the other scenes."""
    batch_size = args.batch_size
    scenes = ds.draw_scenes(batch_size, "train", rng)
    sides = rng.integers(0, 4, batch_size)
    captions = [ds.describe_from_all_sides(scenes, i)[side] for i, side in enumerate(sides)]
    text = processor.tokenizer(captions, padding=True, return_tensors="pt")
    pixels = to_pixels(scenes.images, processor.image_processor)
    images, missed = encode_images(model, pixels, digit_patches(scenes), args.num_tokens, rng)
    texts = model.get_text_features(**text).pooler_output
    images, texts = (torch.nn.functional.normalize(features.float(), dim=-1) for features in (images, texts))
    similarity = texts @ images.T
    found = (similarity.argmax(0) == torch.arange(batch_size)).float().mean().item()
    return image_text_contrastive_loss(similarity * model.logit_scale.exp()), missed, {"found": found}


def main():
    args = parse_arguments(make_parser(__doc__, start="blip-retrieval-digits", batch_size=64))
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng([args.seed, 8])
    with opened_log(args) as say:
        model, processor = start_from(args.start_from)
        model.train()
        train(
            list(model.parameters()),
            lambda: pair_loss(model, processor, args, rng),
            args,
            say,
        )
        processor.tokenizer.backend_tokenizer.no_padding()  # undo the padding that training has set
        processor.save_pretrained(args.output_dir)
        model.set_attn_implementation("sdpa")
        model.half().save_pretrained(args.output_dir)
        say(parameters=sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    main()
