"""Training, selection, scoring and export of the tiny latent pipelines; sdxl.py, sd15.py and sd3.py call `build`.

A family says how its components look, how it turns token ids into the denoiser's conditioning, and which objective
it has; everything else is one path: text encoders trained jointly with the denoiser, caption dropout to "",
moving-average weights. The checkpoint is chosen on the dev captions; the held-out captions are scored once, on the
exported fp16 folder, through the stock diffusers pipeline.

Shapes: B batch, P pool of encoded renders, T tokens, D text width, C = 4 latent channels, H = W = 8.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import cards
import common
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline
from objectives import Objective
from parts import CONTEXT_LENGTH

from mmalign.synthetic.render import render
from mmalign.synthetic.scenes import TIERS, captions, sample_scenes
from mmalign.synthetic.scorer import Scores, score

GUIDANCE_SCALE = 3.0
INFERENCE_STEPS = 20
CAPTION_DROPOUT = 0.1
RELATIONS_SHARE = 0.2
BATCH_SIZE = 48
POOL_SIZE = 12000
EMA_DECAY = 0.998
TEXT_LEARNING_RATE = 1e-3
# The base has to be recognisable and wrong often enough for a method to repair; the dev share nearest to this wins.
TARGET_ALL_RIGHT = 0.60


class Family(ABC):
    """What differs between the pipelines."""

    name: str
    pipeline_class: type[DiffusionPipeline]
    denoiser: str
    objective: Objective
    learning_rate = 2e-3
    seed: int
    # Steps to train, and the length of the learning-rate schedule of which they are the beginning.
    steps: int
    schedule_steps: int
    # Arguments that from_pretrained needs, that every call needs, and others to measure beside them, by name on the card.
    load: ClassVar[dict[str, object]] = {}
    call: ClassVar[dict[str, object]] = {}
    variants: ClassVar[dict[str, dict[str, object]]] = {}
    remarks: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def components(self, tokenizer) -> dict[str, torch.nn.Module]:
        """Freshly initialised trainable modules, the denoiser among them under its name in the pipeline."""

    @abstractmethod
    def condition(
        self, modules: dict[str, torch.nn.Module], ids_BT: torch.Tensor, time_ids_B6: torch.Tensor, step: int
    ) -> dict:
        """Keyword arguments of the denoiser's forward for these prompts; `step` is for what varies between batches."""

    @abstractmethod
    def pipeline(self, modules: dict[str, torch.nn.Module], vae, tokenizer, scheduler) -> DiffusionPipeline:
        """The stock pipeline around these modules."""


@dataclass(frozen=True)
class Pool:
    """Encoded train renders: posterior means and deviations [P,C,H,W] in denoiser units, captions, and time ids [P,6]."""

    mean_PCHW: torch.Tensor
    std_PCHW: torch.Tensor
    texts: list[str]
    time_ids_P6: torch.Tensor


def load_vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(common.WORK_DIR / "vae").eval()


def conditioned_renders(seed: int, size: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Captions, uint8 images and their true micro-conditioning (original height, width, crop top, left, target h, w).

    Most are plain renders; one in twelve is an upscaled 32 px original and one in twelve a crop of a 72 px one.
    """
    rng = np.random.default_rng([seed])
    num_relations = int(size * RELATIONS_SHARE)
    texts = [str(t) for t in rng.choice(captions("attributes", "train"), size - num_relations)]
    texts += [str(t) for t in rng.choice(captions("relations", "train"), num_relations)]
    texts = [texts[i] for i in rng.permutation(size)]
    scenes = sample_scenes(texts, rng)
    px = common.SIZE_PX
    images = render(scenes, px)
    time_ids = np.tile(np.array([px, px, 0, 0, px, px], np.float32), (size, 1))
    num_special = size // 12
    low = render(scenes[:num_special], 32).astype(np.float32)
    low_BCHW = torch.from_numpy(low).permute(0, 3, 1, 2)
    up_BCHW = F.interpolate(low_BCHW, size=(px, px), mode="bicubic", align_corners=False)
    images[:num_special] = up_BCHW.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()
    time_ids[:num_special, :2] = 32
    wide = render(scenes[num_special : 2 * num_special], 72)
    for n, picture in enumerate(wide, start=num_special):
        top, left = (int(v) for v in rng.integers(0, 72 - px + 1, size=2))
        images[n] = picture[top : top + px, left : left + px]
        time_ids[n, :4] = (72, 72, top, left)
    return texts, images, time_ids


@torch.no_grad()
def encoded_pool(vae: AutoencoderKL, seed: int) -> Pool:
    texts, images, time_ids = conditioned_renders(seed, POOL_SIZE)
    scale = vae.config.scaling_factor
    means, stds = [], []
    for start in range(0, POOL_SIZE, 100):
        posterior = vae.encode(common.to_model(images[start : start + 100])).latent_dist
        means.append(posterior.mean * scale)
        stds.append(posterior.std * scale)
    return Pool(torch.cat(means), torch.cat(stds), texts, torch.from_numpy(time_ids))


def train(family: Family, steps: int, tokenizer, checkpoint_steps: tuple[int, ...]) -> None:
    """Train and leave moving-average weights of every checkpoint step in the work folder."""
    torch.manual_seed(family.seed)
    modules = family.components(tokenizer)
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in modules.items()}
    print(f"[{family.name}] parameters {sizes}", flush=True)
    text_parameters = [p for name, m in modules.items() if name != family.denoiser for p in m.parameters()]
    ratio = TEXT_LEARNING_RATE / family.learning_rate
    optimizer = torch.optim.AdamW(
        [{"params": list(modules[family.denoiser].parameters())}, {"params": text_parameters}],
        lr=family.learning_rate,
        weight_decay=1e-2,
    )
    vae = load_vae()
    started = time.process_time()
    pool = encoded_pool(vae, family.seed)
    print(f"[{family.name}] {POOL_SIZE} renders encoded in {time.process_time() - started:.0f} CPU-s", flush=True)
    ids_PT = common.token_ids(tokenizer, pool.texts)
    empty_T = common.token_ids(tokenizer, [""])[0]
    emas = {name: common.Ema(m, EMA_DECAY) for name, m in modules.items()}
    kept = {**modules, **{f"ema_{name}": ema for name, ema in emas.items()}}
    seen = {"loss": 0.0}
    for step in common.training_steps(
        f"{family.name}-train",
        family.schedule_steps,
        kept,
        optimizer,
        family.learning_rate,
        lambda: f"loss {seen['loss']:.4f}",
        checkpoint_steps=checkpoint_steps,
    ):
        if step >= steps:
            break
        optimizer.param_groups[1]["lr"] *= ratio  # training_steps set one rate for both groups
        generator = torch.Generator().manual_seed(family.seed * 1_000_003 + step)
        pick_B = torch.randint(len(pool.texts), (BATCH_SIZE,), generator=generator)
        jitter_BCHW = torch.randn(pool.mean_PCHW[pick_B].shape, generator=generator)
        latent_BCHW = pool.mean_PCHW[pick_B] + pool.std_PCHW[pick_B] * jitter_BCHW
        noise_BCHW = torch.randn(latent_BCHW.shape, generator=generator)
        time_B = family.objective.draw(BATCH_SIZE, generator)
        dropped_B = torch.rand(BATCH_SIZE, generator=generator) < CAPTION_DROPOUT
        ids_BT = torch.where(dropped_B[:, None], empty_T, ids_PT[pick_B])
        noisy_BCHW, target_BCHW = family.objective.noised(latent_BCHW, noise_BCHW, time_B)
        condition = family.condition(modules, ids_BT, pool.time_ids_P6[pick_B], step)
        predicted_BCHW = modules[family.denoiser](noisy_BCHW, timestep=time_B, **condition).sample
        loss = F.mse_loss(predicted_BCHW, target_BCHW)
        common.optimize(optimizer, loss)
        for name, ema in emas.items():
            ema.update(modules[name], step)
        seen["loss"] = 0.95 * seen["loss"] + 0.05 * loss.item() if seen["loss"] else loss.item()


def checkpoint_pipeline(family: Family, tokenizer, checkpoint: str) -> DiffusionPipeline:
    """The stock pipeline around the moving-average weights of one checkpoint, in fp32."""
    weights = common.trained_modules(checkpoint)
    modules = family.components(tokenizer)
    for name, module in modules.items():
        module.load_state_dict(weights[f"ema_{name}"])
        module.eval()
    pipe = family.pipeline(modules, load_vae(), tokenizer, family.objective.scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def measure(
    pipe: DiffusionPipeline, texts: list[str], per_caption: int, guidance: float, call: dict, seed: int = 0
) -> Scores:
    """Exact scores of `per_caption` images of each text; noise is a function of (seed, text index, image index)."""
    settings = {"num_inference_steps": INFERENCE_STEPS, **call}
    repeated = [t for t in texts for _ in range(per_caption)]
    images = []
    for start in range(0, len(repeated), 64):
        batch = repeated[start : start + 64]
        generators = [torch.Generator().manual_seed(seed * 100_003 + start + k) for k in range(len(batch))]
        out = pipe(
            batch,
            guidance_scale=guidance,
            height=common.SIZE_PX,
            width=common.SIZE_PX,
            generator=generators,
            output_type="np",
            **settings,
        ).images
        images.append((out * 255.0).round().astype(np.uint8))
    return score(np.concatenate(images), repeated)


def summary(scores: Scores) -> dict[str, float]:
    """Means of one batch of scores, and the standard error over images of the all-right share."""
    share = float(scores.all_right.mean())
    names = dict.fromkeys(p.name for s in scores.images for p in s.parts)
    return {
        "graded": round(float(scores.graded.mean()), 4),
        "fraction": round(float(scores.fraction.mean()), 4),
        "all_right": round(share, 4),
        "all_right_standard_error": round(math.sqrt(share * (1 - share) / len(scores.images)), 4),
        **{f"{name}_right": round(scores.accuracy(name), 4) for name in names},
    }


@torch.no_grad()
def vae_ceiling(vae: AutoencoderKL, tier: str, split: str, seed: int = 99) -> dict[str, float]:
    """Scores of encoded and decoded renders: what no generator on this VAE can beat."""
    texts, images = common.renders_of(list(captions(tier, split)), seed, 4)
    latent_BCHW = vae.encode(common.to_model(images)).latent_dist.mean
    return summary(score(common.to_uint8(vae.decode(latent_BCHW).sample), texts))


def export(pipe: DiffusionPipeline, family: Family, facts: dict) -> Path:
    """Write the fp16 pipeline folder with its card in place of the old one."""
    target = common.ASSETS_DIR / family.name
    with common.replaced_folder(target) as folder:
        pipe.to(dtype=torch.float16).save_pretrained(folder)
        # transformers computes in the dtype its config names, diffusers in fp32 unless told: without this a plain
        # from_pretrained(folder) mixes fp16 text encoders with an fp32 denoiser and fails.
        for config in folder.glob("*/config.json"):
            content = json.loads(config.read_text())
            content.pop("_name_or_path", None)  # a folder of the machine that built it
            if config.parent.name.startswith("text_encoder"):
                content["dtype"] = "float32"
            config.write_text(json.dumps(content, indent=2) + "\n")
        common.forget_padding(folder)
        cards.write_card(folder, facts)
    return target


def load_exported(family: Family) -> DiffusionPipeline:
    """The shipped folder as a user loads it; computes in fp32."""
    pipe = family.pipeline_class.from_pretrained(common.ASSETS_DIR / family.name, **family.load)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampling_facts(family: Family) -> dict:
    """The part of the card that says how to draw images, known before any score is."""
    return {
        "name": family.name,
        "format": "diffusers",
        "pipeline_class": family.pipeline_class.__name__,
        "load": family.load,
        "objective": family.objective.description,
        "sampler": family.objective.sampler,
        "remarks": [family.objective.caution, *family.remarks],
        "image_size_px": common.SIZE_PX,
        "guidance_scale": GUIDANCE_SCALE,
        "num_inference_steps": INFERENCE_STEPS,
        **family.call,
        "unconditional_prompt": "",
    }


def build(family: Family) -> None:
    """Train, choose the checkpoint on dev, export, score the export on held-out once, and write the card."""
    parser = argparse.ArgumentParser(description=f"Train assets/{family.name}.")
    parser.add_argument("--steps", type=int, default=family.steps, help="train so many steps of the schedule")
    parser.add_argument("--preview", metavar="CHECKPOINT", help="export this checkpoint unscored, and stop")
    parser.add_argument("--only-train", action="store_true", help="stop before choosing and exporting")
    arguments = parser.parse_args()
    tokenizer = common.make_tokenizer(CONTEXT_LENGTH)
    if arguments.preview:
        pipe = checkpoint_pipeline(family, tokenizer, arguments.preview)
        print(export(pipe, family, sampling_facts(family) | {"preview": True}))
        return
    candidates = tuple(sorted({*range(1000, arguments.steps + 1, 500), arguments.steps}))
    train(family, arguments.steps, tokenizer, candidates)
    if arguments.only_train:
        return

    dev = list(captions("attributes", "dev"))
    dev_scores = {}
    for step in candidates:
        pipe = checkpoint_pipeline(family, tokenizer, f"{family.name}-train-{step}")
        dev_scores[step] = round(float(measure(pipe, dev, 4, GUIDANCE_SCALE, family.call).all_right.mean()), 4)
        print(f"[{family.name}] dev all-right at step {step}: {dev_scores[step]:.3f}", flush=True)
    chosen = min(candidates, key=lambda step: abs(dev_scores[step] - TARGET_ALL_RIGHT))
    facts = sampling_facts(family) | {
        "chosen_step": chosen,
        "total_steps": arguments.steps,
        "schedule_steps": family.schedule_steps,
        "batch_size": BATCH_SIZE,
        "num_renders": POOL_SIZE,
        "relations_share": RELATIONS_SHARE,
        "caption_dropout": CAPTION_DROPOUT,
        "ema_decay": EMA_DECAY,
        "target_all_right": TARGET_ALL_RIGHT,
        "seed": family.seed,
        "dev_all_right_by_step": {str(k): v for k, v in dev_scores.items()},
        "command": f"python assets/build/{family.name.split('-')[0]}.py",
    }
    pipe = checkpoint_pipeline(family, tokenizer, f"{family.name}-train-{chosen}")
    export(pipe, family, facts | {"preview": True})
    pipe = load_exported(family)
    names = (family.denoiser, "vae", "text_encoder", "text_encoder_2")
    facts["parameters"] = {
        n: sum(p.numel() for p in getattr(pipe, n).parameters()) for n in names if getattr(pipe, n, None) is not None
    }
    facts["vae_facts"] = json.loads((common.WORK_DIR / "vae" / "facts.json").read_text())
    heldout = {tier: list(captions(tier, "heldout")) for tier in TIERS}
    facts["vae_ceiling"] = {tier: vae_ceiling(pipe.vae, tier, "heldout") for tier in heldout}
    facts["heldout"] = {
        tier: {f"guidance_{g:g}": summary(measure(pipe, texts, 4, g, family.call)) for g in (1.0, GUIDANCE_SCALE, 5.0)}
        for tier, texts in heldout.items()
    }
    if family.variants:
        facts["heldout_variants"] = {
            name: {
                f"guidance_{g:g}": summary(measure(pipe, heldout["attributes"], 4, g, family.call | call))
                for g in (1.0, GUIDANCE_SCALE)
            }
            for name, call in family.variants.items()
        }
    print(json.dumps(facts, indent=1), flush=True)
    pipe = checkpoint_pipeline(family, tokenizer, f"{family.name}-train-{chosen}")
    export(pipe, family, facts)
