"""Train the 8x AutoencoderKL that the tiny pipelines share: 64 px images, 8 x 8 x 4 latents.

    python assets/build/vae.py

Loss = weighted L1 + MSE + 4 * L1 of 8 x 8 average-pooled residuals + KL. Without the pooled term colour arrives
a thousand steps late; without the weight on object pixels the shape of small objects stays a rounded blob.
Two phases: encoder and decoder together; then, with the encoder frozen and its latents normalised, the decoder alone.
The pipelines can start on the latents after the first phase, the second only sharpens what they are decoded to.
Leaves .work/vae (save_pretrained, fp32, with its scaling_factor) for sdxl.py, sd15.py and sd3.py.
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
DECODER_STEPS = 2500
DECODER_LEARNING_RATE = 1.5e-3
DECODER_LATENT_NOISE = 0.1  # deviation, in units of a normalised latent: a UNet's latents are not an encoder's
RELATIONS_SHARE = 0.25
# Not 1, so that code which forgets scaling_factor fails on the tiny models as it would on the real ones.
LATENT_STD = 2.0
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


def reconstruction_loss(decoded_BCHW: torch.Tensor, image_BCHW: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The pixel part of the loss, and the plain L1 for the log."""
    residual_BCHW = decoded_BCHW - image_BCHW
    background_B = image_BCHW[:, :, :1, :1]
    is_object = ((image_BCHW - background_B).abs().amax(dim=1, keepdim=True) > 0.1).float()
    weight = 1.0 + 2.0 * is_object
    weight = weight / weight.mean(dim=(1, 2, 3), keepdim=True)
    l1 = residual_BCHW.abs()
    pooled = F.avg_pool2d(residual_BCHW, 8).abs().mean()
    return (weight * (l1 + residual_BCHW.square())).mean() + 4.0 * pooled, l1.mean().item()


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL) -> dict[str, object]:
    """Make every latent channel mean 0 and deviation LATENT_STD by rewriting the VAE's two 1 x 1 convolutions.

    Images stay the same. Channels differ fourfold in spread otherwise, one scalar scaling_factor cannot even them out,
    and Stable Diffusion 1.5 pipelines do not read per-channel statistics from the config.
    """
    latents = []
    for step in range(16):
        _, images = common.train_batch(SEED + 1, step, 64, RELATIONS_SHARE)
        latents.append(vae.encode(common.to_model(images)).latent_dist.mean)
    latent_BCHW = torch.cat(latents)
    mean_C, std_C = latent_BCHW.mean(dim=(0, 2, 3)), latent_BCHW.std(dim=(0, 2, 3))
    gain_C = LATENT_STD / std_C
    into, out_of = vae.quant_conv, vae.post_quant_conv
    num = len(mean_C)
    out_of.bias += out_of.weight[:, :, 0, 0] @ mean_C
    out_of.weight /= gain_C[None, :, None, None]
    into.weight[:num] *= gain_C[:, None, None, None]
    into.bias[:num] = (into.bias[:num] - mean_C) * gain_C
    into.bias[num:] += 2 * gain_C.log()  # log-variances
    return {
        "scaling_factor": 1.0 / LATENT_STD,
        "channel_mean_before_folding": [round(float(v), 4) for v in mean_C],
        "channel_std_before_folding": [round(float(v), 4) for v in std_C],
    }


def image_batch(seed: int, step: int) -> torch.Tensor:
    _, images = common.train_batch(seed, step, BATCH_SIZE, RELATIONS_SHARE)
    return common.to_model(images).to(memory_format=torch.channels_last)


def train_both(vae: AutoencoderKL, steps: int) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=1e-4)
    seen = {"l1": 0.0}
    for step in common.training_steps(
        "vae-train", steps, {"vae": vae}, optimizer, LEARNING_RATE, lambda: f"l1 {seen['l1']:.4f}"
    ):
        image_BCHW = image_batch(SEED, step)
        posterior = vae.encode(image_BCHW).latent_dist
        latent_BCHW = posterior.sample(generator=torch.Generator().manual_seed(step))
        loss, seen["l1"] = reconstruction_loss(vae.decode(latent_BCHW).sample, image_BCHW)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        common.optimize(optimizer, loss + KL_WEIGHT * kl)


def train_decoder(vae: AutoencoderKL, steps: int) -> None:
    """Second phase: `vae` has normalised latents, and its encoder stays as it is."""
    decoder = torch.nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=DECODER_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=1e-4)
    seen = {"l1": 0.0}
    for step in common.training_steps(
        "vae-decoder", steps, {"decoder": decoder}, optimizer, DECODER_LEARNING_RATE, lambda: f"l1 {seen['l1']:.4f}"
    ):
        image_BCHW = image_batch(SEED + 2, step)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(step)
            latent_BCHW = vae.encode(image_BCHW).latent_dist.mean
            noise_BCHW = torch.randn(latent_BCHW.shape, generator=generator)
            latent_BCHW = latent_BCHW + LATENT_STD * DECODER_LATENT_NOISE * noise_BCHW
        loss, seen["l1"] = reconstruction_loss(vae.decode(latent_BCHW).sample, image_BCHW)
        common.optimize(optimizer, loss)


def write(vae: AutoencoderKL, facts: dict) -> None:
    with common.replaced_folder(OUT) as folder:
        vae.save_pretrained(folder)
        (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--decoder-steps", type=int, default=DECODER_STEPS)
    arguments = parser.parse_args()
    vae = build_model()
    train_both(vae, arguments.steps)
    vae.eval()
    facts = fold_statistics(vae)
    vae.register_to_config(scaling_factor=facts["scaling_factor"])
    facts |= {
        "steps": arguments.steps,
        "decoder_steps": 0,
        "seed": SEED,
        "batch_size": BATCH_SIZE,
        "relations_share": RELATIONS_SHARE,
    }
    write(vae, facts)
    train_decoder(vae, arguments.decoder_steps)
    write(vae, facts | {"decoder_steps": arguments.decoder_steps})


if __name__ == "__main__":
    main()
