"""Train assets/clip-tiny: an open_clip model of the world, with its own tokenizer and JSON config.

    python assets/build/clip.py

Contrastive over batches that hold every train caption of the attributes tier once (so each caption meets all of
its one-word neighbours) plus some relations. A small linear head reads the object's centre from the same
normalised image embedding during training and is thrown away: captions do not name positions, so without it
the embedding would forget them, and the aesthetic head (aesthetic.py) needs the height.
"""

from __future__ import annotations

import argparse
import json

import cards
import common
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mmalign.synthetic.render import render
from mmalign.synthetic.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    ObjectSpec,
    SceneSpec,
    caption,
    captions,
    parse,
    sample_scenes,
)

SEED = 21
STEPS = 1500
LEARNING_RATE = 1e-3
NUM_RELATIONS = 24
CENTRE_WEIGHT = 0.5
OUT = common.ASSETS_DIR / "clip-tiny"
CONTEXT_LENGTH = 24


def model_config(tokenizer) -> dict:
    return {
        "embed_dim": 64,
        "vision_cfg": {"image_size": common.SIZE_PX, "layers": 3, "width": 96, "head_width": 24, "patch_size": 8},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": len(tokenizer),
            # open_clip falls back to its 49k tokenizer without a word when this is empty.
            "hf_tokenizer_name": "clip-tiny",
            "width": 64,
            "heads": 4,
            "layers": 2,
            "pool_type": "eos",
            "eos_id": tokenizer.eos_token_id,
            "pad_id": tokenizer.pad_token_id,
        },
    }


def build_model(tokenizer) -> open_clip.CLIP:
    torch.manual_seed(SEED)
    return open_clip.CLIP(**model_config(tokenizer))


def training_batch(step: int) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Captions, images in [-1, 1] with mild blur and noise, and centres of one-object scenes, scaled to about unit."""
    rng = np.random.default_rng([SEED, step])
    texts = list(captions("attributes", "train"))
    num_single = len(texts)
    texts += [str(t) for t in rng.choice(captions("relations", "train"), NUM_RELATIONS, replace=False)]
    scenes = sample_scenes(texts, rng)
    image_BCHW = common.to_model(render(scenes, common.SIZE_PX))
    # Generated images are softer and noisier than renders; the score should not turn on that.
    blurred_BCHW = F.interpolate(F.avg_pool2d(image_BCHW, 2), scale_factor=2, mode="bilinear")
    mix_B = torch.from_numpy(rng.uniform(0, 1, len(texts)) * (rng.uniform(size=len(texts)) < 0.4)).float()
    image_BCHW = torch.lerp(image_BCHW, blurred_BCHW, mix_B[:, None, None, None])
    noise_BCHW = torch.from_numpy(rng.standard_normal(image_BCHW.shape, dtype=np.float32))
    image_BCHW = image_BCHW + 0.1 * torch.from_numpy(rng.uniform(0, 1, (len(texts), 1, 1, 1))).float() * noise_BCHW
    centre_B2 = torch.tensor([[s.objects[0].x - 0.5, s.objects[0].y - 0.5] for s in scenes[:num_single]])
    return texts, image_BCHW, 8.0 * centre_B2


def one_word_neighbours(text: str) -> list[str]:
    """All captions that differ from an attributes caption in exactly one word (11 of them)."""
    spec = parse(text)
    (only,) = spec.objects
    out = [SceneSpec(b, (only,)) for b in BACKGROUNDS if b != spec.background]
    out += [SceneSpec(spec.background, (ObjectSpec(c, only.shape, only.size),)) for c in COLOURS if c != only.colour]
    out += [SceneSpec(spec.background, (ObjectSpec(only.colour, s, only.size),)) for s in SHAPES if s != only.shape]
    out += [SceneSpec(spec.background, (ObjectSpec(only.colour, only.shape, z),)) for z in SIZES if z != only.size]
    return [caption(s) for s in out]


@torch.no_grad()
def recall_at_1(model, tokenizer, split: str, num_distractors: int = 8, per_caption: int = 4) -> float:
    """Share of fresh renders whose own caption beats `num_distractors` captions that are one word off."""
    texts, images = common.renders_of(list(captions("attributes", split)), SEED + 2, per_caption)
    rng = np.random.default_rng([SEED, 7])
    image_NE = model.encode_image(common.to_model(images), normalize=True)
    right = []
    for n, text in enumerate(texts):
        rivals = [str(t) for t in rng.choice(one_word_neighbours(text), num_distractors, replace=False)]
        text_KE = model.encode_text(common.token_ids(tokenizer, [text, *rivals]), normalize=True)
        right.append(int((text_KE @ image_NE[n]).argmax()) == 0)
    return float(np.mean(right))


def write_folder(model, tokenizer, facts: dict) -> None:
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    with common.replaced_folder(OUT) as folder:
        state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
        save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
        config = {"model_cfg": model_config(tokenizer), "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.save_pretrained(folder)
        common.forget_padding(folder)
        cards.write_card(folder, facts)


@torch.no_grad()
def height_r2(model) -> float:
    """R2 on held-out captions of a least-squares fit (on train captions) of the centre's height."""

    def embed(split: str, per_caption: int, seed: int):
        rng = np.random.default_rng([seed])
        texts = [t for t in captions("attributes", split) for _ in range(per_caption)]
        scenes = sample_scenes(texts, rng)
        image_NE = model.encode_image(common.to_model(render(scenes, common.SIZE_PX)), normalize=True)
        ones = torch.ones(len(texts), 1)
        return torch.cat([image_NE, ones], 1).double(), torch.tensor([1 - s.objects[0].y for s in scenes]).double()

    x, y = embed("train", 20, SEED + 3)
    weight = torch.linalg.lstsq(x, y[:, None]).solution
    x, y = embed("heldout", 8, SEED + 4)
    return 1.0 - float((x @ weight - y[:, None]).square().mean() / y.var(unbiased=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps
    tokenizer = common.make_tokenizer(CONTEXT_LENGTH)
    model = build_model(tokenizer)
    centre_head = torch.nn.Linear(64, 2)
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *centre_head.parameters()], lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05
    )
    seen = {"contrastive": 0.0, "centre": 0.0}

    def describe() -> str:
        return f"contrastive {seen['contrastive']:.3f} centre {seen['centre']:.3f}"

    model.train()
    for step in common.training_steps(
        "clip-train",
        steps,
        {"model": model, "centre": centre_head},
        optimizer,
        LEARNING_RATE,
        describe,
    ):
        texts, image_BCHW, centre_B2 = training_batch(step)
        image_BE = model.encode_image(image_BCHW, normalize=True)
        text_BE = model.encode_text(common.token_ids(tokenizer, texts), normalize=True)
        logits_BB = model.logit_scale.exp() * image_BE @ text_BE.T
        target_B = torch.arange(len(texts))
        contrastive = 0.5 * (F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B))
        centre = F.mse_loss(centre_head(image_BE[: len(centre_B2)]), centre_B2)
        seen["contrastive"], seen["centre"] = contrastive.item(), centre.item()
        common.optimize(optimizer, contrastive + CENTRE_WEIGHT * centre)
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100.0))
    model.eval()
    # What is shipped is fp16, so what is measured is what fp16 rounds to.
    model.half().float()
    facts = {
        "name": "clip-tiny",
        "format": "open_clip local-dir",
        "captions_per_step": {"attributes": len(captions("attributes", "train")), "relations": NUM_RELATIONS},
        "steps": steps,
        "seed": SEED,
        "image_size_px": common.SIZE_PX,
        "embed_dim": 64,
        "context_length": CONTEXT_LENGTH,
        "parameters": sum(p.numel() for p in model.parameters()),
        "centre_weight": CENTRE_WEIGHT,
        "recall_at_1_heldout": recall_at_1(model, tokenizer, "heldout"),
        "recall_at_1_dev": recall_at_1(model, tokenizer, "dev"),
        "num_distractors": 8,
        "num_images": 4 * len(captions("attributes", "heldout")),
        "height_r2_heldout": height_r2(model),
        "command": "python assets/build/clip.py",
    }
    write_folder(model, tokenizer, facts)
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
