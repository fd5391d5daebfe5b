"""Make assets/sdxl-pairs: preference pairs for sdxl-tiny against images that the model itself drew.

    python assets/build/sdxl.py && python assets/build/sdxl_pairs.py

Train captions only. Rejected is the model's own sample for the caption, drawn without guidance. Chosen is the nearest of
NUM_CANDIDATES renders of the caption, with the object where the sample has it, so that what differs is what is wrong. Every
pair agrees with the exact scorer. All images are stored in one lossy codec: a trace of the codec on one side alone would be
what a model learns.

One Parquet file with the columns id, prompt, chosen and rejected.
"""

from __future__ import annotations

import io
import json

import cards
import common
import numpy as np
import sdxl
import torch
from datasets import Dataset, Features, Image, Value
from diffusers import StableDiffusionXLPipeline
from PIL import Image as Pil

from mmalign.synthetic.render import render
from mmalign.synthetic.scenes import captions, sample_scene
from mmalign.synthetic.scorer import score

NAME = "sdxl-pairs"
SEED = 63
SAMPLES_PER_CAPTION = 16
NUM_CANDIDATES = 64
GUIDANCE_SCALE = 1.0
NUM_STEPS = 15
BATCH = 64
WEBP_QUALITY = 90
FEATURES = Features(
    {
        "id": Value("string"),
        "prompt": Value("string"),
        "chosen": Image(),
        "rejected": Image(),
    }
)


def own_samples(pipe: StableDiffusionXLPipeline) -> list[tuple[str, np.ndarray]]:
    """SAMPLES_PER_CAPTION images [H,W,3] of every train caption; the noise is a function of (caption, number)."""
    texts = captions("attributes", "train")
    jobs = [(number, k) for k in range(SAMPLES_PER_CAPTION) for number in range(len(texts))]
    found = []
    for start in range(0, len(jobs), BATCH):
        some = jobs[start : start + BATCH]
        keys = [np.random.SeedSequence([SEED, int(GUIDANCE_SCALE), *job]).generate_state(1)[0] for job in some]
        images = pipe(
            [texts[number] for number, _ in some],
            guidance_scale=GUIDANCE_SCALE,
            num_inference_steps=NUM_STEPS,
            height=common.SIZE_PX,
            width=common.SIZE_PX,
            generator=[torch.Generator().manual_seed(int(key)) for key in keys],
        ).images
        found += [(texts[number], np.asarray(image)) for (number, _), image in zip(some, images, strict=True)]
    return found


def nearest_render(prompt: str, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Of NUM_CANDIDATES renders of the caption [H,W,3] the one with the smallest mean squared difference to the image."""
    renders_NHWC = render([sample_scene(prompt, rng) for _ in range(NUM_CANDIDATES)], common.SIZE_PX)
    squared_NHWC = (renders_NHWC.astype(np.float32) - image_HWC) ** 2
    return renders_NHWC[int(squared_NHWC.mean(axis=(1, 2, 3)).argmin())]


def encoded(image_HWC: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Pil.fromarray(image_HWC).save(buffer, format="WEBP", quality=WEBP_QUALITY, method=6)
    return {"bytes": buffer.getvalue(), "path": None}


def stored(rows: list[dict], side: str) -> list[Pil.Image]:
    return [Pil.open(io.BytesIO(row[side]["bytes"])).convert("RGB") for row in rows]


def graded(rows: list[dict], side: str) -> np.ndarray:
    """[N] exact scores of the images as they are stored."""
    return score(stored(rows, side), [row["prompt"] for row in rows]).graded


def pairs(pipe: StableDiffusionXLPipeline) -> list[dict]:
    """The rows whose preference the exact scorer shares."""
    rng = np.random.default_rng([SEED, int(GUIDANCE_SCALE)])
    rows = [
        {
            "id": f"own-{index}",
            "prompt": prompt,
            "chosen": encoded(nearest_render(prompt, rejected, rng)),
            "rejected": encoded(rejected),
        }
        for index, (prompt, rejected) in enumerate(own_samples(pipe))
    ]
    return [row for row, better in zip(rows, graded(rows, "chosen") > graded(rows, "rejected"), strict=True) if better]


def main() -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(common.ASSETS_DIR / sdxl.SdxlTiny.name, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    rows = pairs(pipe)
    rows = [rows[int(k)] for k in np.random.default_rng(SEED).permutation(len(rows))]
    right = score(stored(rows, "rejected"), [row["prompt"] for row in rows]).all_right
    facts = {
        "name": NAME,
        "format": "Parquet, preference rows with images",
        "model": sdxl.SdxlTiny.name,
        "num_pairs": len(rows),
        "guidance_scale": GUIDANCE_SCALE,
        "own_right": round(float(right.mean()), 4),
        "num_inference_steps": NUM_STEPS,
        "nearest_of": NUM_CANDIDATES,
        "webp_quality": WEBP_QUALITY,
        "split": "train",
        "seed": SEED,
        "command": "python assets/build/sdxl_pairs.py",
    }
    with common.replaced_folder(common.ASSETS_DIR / NAME) as folder:
        Dataset.from_list(rows, features=FEATURES).to_parquet(folder / "train.parquet")
        cards.write_card(folder, facts)
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
