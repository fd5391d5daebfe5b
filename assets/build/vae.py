"""Train the 8x AutoencoderKL that the tiny pipelines share: 64 px images, 8 x 8 x 4 latents.

    python assets/build/vae.py

Loss = weighted L1 + MSE + 4 * L1 of 8 x 8 average-pooled residuals + KL. Without the pooled term colour arrives
a thousand steps late; without the weight on object pixels the shape of small objects stays a rounded blob.
Leaves .work/vae (save_pretrained, fp32, with the measured scaling_factor) for sdxl.py and sd15.py.
"""

from __future__ import annotations

import argparse
import json

import common
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

SEED = 11
STEPS = 4000
BATCH_SIZE = 16
LEARNING_RATE = 2e-3
KL_WEIGHT = 3e-4
RELATIONS_SHARE = 0.25
OUT = common.WORK_DIR / "vae"


def build_model() -> AutoencoderKL:
    torch.manual_seed(SEED)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=common.SIZE_PX,
        force_upcast=False,
    ).to(memory_format=torch.channels_last)


def loss_parts(
    vae: AutoencoderKL, image_BCHW: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, float]:
    """The training loss and the plain L1 (for the log)."""
    posterior = vae.encode(image_BCHW).latent_dist
    residual_BCHW = vae.decode(posterior.sample(generator=generator)).sample - image_BCHW
    background_B = image_BCHW[:, :, :1, :1]
    is_object = ((image_BCHW - background_B).abs().amax(dim=1, keepdim=True) > 0.1).float()
    weight = 1.0 + 2.0 * is_object
    weight = weight / weight.mean(dim=(1, 2, 3), keepdim=True)
    l1 = residual_BCHW.abs()
    pooled = F.avg_pool2d(residual_BCHW, 8).abs().mean()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    loss = (weight * (l1 + residual_BCHW.square())).mean() + 4.0 * pooled + KL_WEIGHT * kl
    return loss, l1.mean().item()


def measure_latents(vae: AutoencoderKL) -> dict[str, object]:
    """Mean and deviation of posterior means over train renders, and the scalar scale that follows."""
    latents = []
    with torch.no_grad():
        for step in range(16):
            _, images = common.train_batch(SEED + 1, step, 64, RELATIONS_SHARE)
            latents.append(vae.encode(common.to_model(images)).latent_dist.mean)
    latent_BCHW = torch.cat(latents)
    return {
        "scaling_factor": round(float(1.0 / latent_BCHW.std()), 5),
        "channel_mean": [round(float(v), 4) for v in latent_BCHW.mean(dim=(0, 2, 3))],
        "channel_std": [round(float(v), 4) for v in latent_BCHW.std(dim=(0, 2, 3))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps
    vae = build_model()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=1e-4)
    seen = {"l1": 0.0}
    for step in common.training_steps(
        "vae-train", steps, {"vae": vae}, optimizer, LEARNING_RATE, lambda: f"l1 {seen['l1']:.4f}"
    ):
        _, images = common.train_batch(SEED, step, BATCH_SIZE, RELATIONS_SHARE)
        image_BCHW = common.to_model(images).to(memory_format=torch.channels_last)
        loss, seen["l1"] = loss_parts(vae, image_BCHW, torch.Generator().manual_seed(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
    vae.eval()
    facts = measure_latents(vae)
    vae.register_to_config(scaling_factor=facts["scaling_factor"])
    with common.replaced_folder(OUT) as folder:
        vae.save_pretrained(folder)
        facts |= {"steps": steps, "seed": SEED, "batch_size": BATCH_SIZE}
        (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
