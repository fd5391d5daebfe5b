"""Make assets/sdxl-pairs: preference pairs for sdxl-tiny, most of them against images that the model itself drew.

    python assets/build/sdxl.py && python assets/build/sdxl_pairs.py

Train captions only. Chosen is always a render of the caption. Rejected is, in a quarter of the pairs, a render with one or two
attributes wrong; in the others the model's own sample for the caption, half of these without guidance and half at the
model's default scale. Every pair agrees with the exact scorer. All images are stored in one lossy codec: a trace of the
codec on one side alone would be what a model learns.

One Parquet file with the columns id, prompt, chosen, rejected, kind and guidance_scale (null for renders).
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

from mmalign.synthetic.pairs import preference_pairs
from mmalign.synthetic.render import render
from mmalign.synthetic.scenes import captions, sample_scene
from mmalign.synthetic.scorer import score

NAME = "sdxl-pairs"
SEED = 63
SAMPLES_PER_CAPTION = 16
OWN_PER_WRONG = 3
GUIDANCE_SCALES = (1.0, 3.0)
NUM_STEPS = 15
BATCH = 64
WEBP_QUALITY = 90
FEATURES = Features(
    {
        "id": Value("string"),
        "prompt": Value("string"),
        "chosen": Image(),
        "rejected": Image(),
        "kind": Value("string"),
        "guidance_scale": Value("float32"),
    }
)


def own_samples(pipe: StableDiffusionXLPipeline, guidance: float) -> list[tuple[str, np.ndarray]]:
    """SAMPLES_PER_CAPTION images [H,W,3] of every train caption; the noise is a function of (scale, caption, number)."""
    texts = captions("attributes", "train")
    jobs = [(number, k) for k in range(SAMPLES_PER_CAPTION) for number in range(len(texts))]
    found = []
    for start in range(0, len(jobs), BATCH):
        some = jobs[start : start + BATCH]
        keys = [np.random.SeedSequence([SEED, int(guidance), *job]).generate_state(1)[0] for job in some]
        images = pipe(
            [texts[number] for number, _ in some],
            guidance_scale=guidance,
            num_inference_steps=NUM_STEPS,
            height=common.SIZE_PX,
            width=common.SIZE_PX,
            generator=[torch.Generator().manual_seed(int(key)) for key in keys],
        ).images
        found += [(texts[number], np.asarray(image)) for (number, _), image in zip(some, images, strict=True)]
    return found


def encoded(image_HWC: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Pil.fromarray(image_HWC).save(buffer, format="WEBP", quality=WEBP_QUALITY, method=6)
    return {"bytes": buffer.getvalue(), "path": None}


def graded(rows: list[dict], side: str) -> np.ndarray:
    """[N] exact scores of the images as they are stored."""
    images = [Pil.open(io.BytesIO(row[side]["bytes"])).convert("RGB") for row in rows]
    return score(images, [row["prompt"] for row in rows]).graded


def agreeing(rows: list[dict]) -> list[dict]:
    """The rows whose preference the exact scorer shares."""
    return [row for row, better in zip(rows, graded(rows, "chosen") > graded(rows, "rejected"), strict=True) if better]


def own_pairs(pipe: StableDiffusionXLPipeline, guidance: float) -> list[dict]:
    samples = own_samples(pipe, guidance)
    rng = np.random.default_rng([SEED, int(guidance)])
    renders = render([sample_scene(prompt, rng) for prompt, _ in samples], common.SIZE_PX)
    return agreeing(
        [
            {
                "id": f"own-g{guidance:g}-{index}",
                "prompt": prompt,
                "chosen": encoded(chosen),
                "rejected": encoded(rejected),
                "kind": "own_sample",
                "guidance_scale": guidance,
            }
            for index, ((prompt, rejected), chosen) in enumerate(zip(samples, renders, strict=True))
        ]
    )


def wrong_pairs(num: int) -> list[dict]:
    return agreeing(
        [
            {
                "id": f"wrong-{index}",
                "prompt": pair.prompt,
                "chosen": encoded(pair.chosen_HWC),
                "rejected": encoded(pair.rejected_HWC),
                "kind": "wrong_attribute",
                "guidance_scale": None,
            }
            for index, pair in enumerate(preference_pairs("wrong_attribute", num, SEED, size_px=common.SIZE_PX))
        ]
    )


def main() -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(common.ASSETS_DIR / sdxl.SdxlTiny.name, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    own = {guidance: own_pairs(pipe, guidance) for guidance in GUIDANCE_SCALES}
    num_own = sum(map(len, own.values()))
    wrong = wrong_pairs(num_own // OWN_PER_WRONG)
    rows = [*wrong, *(row for rows in own.values() for row in rows)]
    rows = [rows[int(k)] for k in np.random.default_rng(SEED).permutation(len(rows))]
    sampled = [row for row in rows if row["kind"] == "own_sample"]
    images = [Pil.open(io.BytesIO(row["rejected"]["bytes"])).convert("RGB") for row in sampled]
    facts = {
        "name": NAME,
        "format": "Parquet, preference rows with images",
        "model": sdxl.SdxlTiny.name,
        "num_pairs": len(rows),
        "pairs_by_kind": {"wrong_attribute": len(wrong), "own_sample": num_own},
        "own_by_guidance_scale": {f"{guidance:g}": len(found) for guidance, found in own.items()},
        "own_right": round(float(score(images, [row["prompt"] for row in sampled]).all_right.mean()), 4),
        "num_inference_steps": NUM_STEPS,
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
