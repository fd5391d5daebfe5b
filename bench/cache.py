"""What encoding once is worth: the published scripts' training step over ours, beside what the FLOPs predict.

    python bench/cache.py [--quick] [--variant lora]

The published Diffusion-DPO and MaPO scripts for SDXL do everything in every step: decode and resize both images of a
pair, encode them with the VAE in fp32 in chunks of 8, run both text encoders, then policy and reference. Ours reads the
latents and text features it encoded once. Both train the same network with the same optimizer, without gradient
checkpointing.
Shape legend: B pairs, R = 2B images (chosen, then rejected), C/H/W pixels, c/h/w latents, S tokens.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from models import PairFlops, Size, flops, sdxl_pair_flops
from PIL import Image
from side_by_side import (
    Result,
    check_same_work,
    chosen_size,
    chosen_variants,
    parser,
    print_results,
    reference_network,
    run_config,
    side_by_side,
    workplace,
)
from torch import Tensor
from torch.nn.functional import logsigmoid
from torchvision import transforms

TARGET = 0.9
BETA = 5000.0
VAE_CHUNK = 8
SDXL_RESOLUTION = 1024


class Published:
    """One step in the manner of the published scripts, on the policy's own modules and the run's own optimizer."""

    def __init__(self, session: Any, policy: Any, batches: Any) -> None:
        from diffusers import DDPMScheduler

        self.pipe, self.autocast, self.device = policy.pipe, policy.autocast, policy.device
        self.unet = policy.pipe.unet
        self.reference = reference_network(policy)
        self.vae = policy.pipe.vae.float()
        self.scheduler = DDPMScheduler.from_config(policy.pipe.scheduler.config)
        self.resolution = policy.resolution
        self.parameters = [parameter for _, parameter in policy.trainable()]
        self.optimizer = session.optimizer.optimizer
        self.batch_size = batches.batch_size
        # A script's loader holds encoded image files, as the data set does.
        self.rows = [(row.prompt, row.chosen.read_bytes(), row.rejected.read_bytes()) for row in batches.rows]
        self.step = 0
        self.prepare = transforms.Compose(
            [
                transforms.Resize(self.resolution, interpolation=transforms.InterpolationMode.BILINEAR),
                transforms.CenterCrop(self.resolution),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

    def __call__(self) -> Tensor:
        first = self.step * self.batch_size
        rows = [self.rows[index % len(self.rows)] for index in range(first, first + self.batch_size)]
        self.step += 1
        latents = self.encode_images(self.load(rows))
        conditioning = self.conditioning([prompt for prompt, _, _ in rows])
        noise = torch.randn_like(latents[: self.batch_size]).repeat(2, 1, 1, 1)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (self.batch_size,), device=self.device)
        t = t.repeat(2)
        noised = self.scheduler.add_noise(latents, noise, t)
        v_prediction = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, t) if v_prediction else noise
        error_R = self.error(self.unet, noised, t, conditioning, target)
        with torch.no_grad():
            if self.reference is None:
                self.unet.disable_adapters()
            reference_R = self.error(self.reference or self.unet, noised, t, conditioning, target)
            if self.reference is None:
                self.unet.enable_adapters()
        chosen_B, rejected_B = (error_R - reference_R).chunk(2)
        loss = -logsigmoid(-0.5 * BETA * (chosen_B - rejected_B)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.tensor(loss.item())  # the scripts read the loss in every step

    def load(self, rows: list[tuple[str, bytes, bytes]]) -> Tensor:
        """`[R, 3, H, W]` in -1 … 1."""
        files = [chosen for _, chosen, _ in rows] + [rejected for _, _, rejected in rows]
        return torch.stack([self.prepare(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])

    @torch.no_grad()
    def encode_images(self, pixels_RCHW: Tensor) -> Tensor:
        """`[R, c, h, w]`, a sample of the posterior."""
        chunks = pixels_RCHW.to(self.device, torch.float32).split(VAE_CHUNK)
        latents = torch.cat([self.vae.encode(chunk).latent_dist.sample() for chunk in chunks])
        return latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def conditioning(self, prompts: list[str]) -> dict[str, Any]:
        """Both text encoders on the prompts of the batch, once for chosen and rejected."""
        pipe, hidden, pooled = self.pipe, [], torch.empty(0)
        for tokenizer, encoder in (
            (pipe.tokenizer, pipe.text_encoder),
            (pipe.tokenizer_2, pipe.text_encoder_2),
        ):
            length = tokenizer.model_max_length
            tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            output = encoder(tokens.input_ids.to(self.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled = output[0]
        side = float(self.resolution)
        return {
            "encoder_hidden_states": torch.cat(hidden, dim=-1).repeat(2, 1, 1),
            "added_cond_kwargs": {
                "text_embeds": pooled.repeat(2, 1),
                "time_ids": torch.tensor([[side, side, 0.0, 0.0, side, side]] * (2 * len(prompts)), device=self.device),
            },
        }

    def error(self, unet: Any, noised: Tensor, t: Tensor, conditioning: dict[str, Any], target: Tensor) -> Tensor:
        """`[R]` mean squared error of the prediction."""
        with self.autocast():
            predicted = unet(noised, t, return_dict=False, **conditioning)[0]
        return (predicted.float() - target.float()).square().flatten(1).mean(1)


def measure(size: Size, folder: Path, variants: tuple[str, ...]) -> list[Result]:
    """Speed-up, and its share of the predicted one, per variant."""
    results, counts = [], {}
    for variant in variants:

        def published(session: Any, policy: Any, batches: Any, variant: str = variant) -> Published:
            other = Published(session, policy, batches)
            some = other.rows[: batches.batch_size]
            pixels = other.load(some)
            vae = flops(lambda: other.encode_images(pixels)) / len(some)
            text = flops(lambda: other.conditioning([prompt for prompt, _, _ in some])) / len(some)
            counts[variant] = PairFlops(flops(other) / len(some) - vae - text, vae, text)
            return other

        timing = side_by_side(run_config(size, folder, lora=variant == "lora"), published, size)
        count = counts[variant]
        check_same_work(timing.ours_flops, size.batch_size * count.unet)
        results += [
            Result.speedup(
                f"cache speed-up, {variant}",
                timing,
                note=f"UNet : VAE : text {count.shares} of the FLOPs, which predict {count.speedup:.3f}",
            ),
            Result.speedup(f"… / predicted, {variant}", timing, over=count.speedup, at_least=TARGET),
        ]
    return results


def predictions() -> list[str]:
    """What the FLOPs of the real SDXL say."""
    return [
        f"SDXL at {SDXL_RESOLUTION} px, {variant}, no checkpointing: {count.unet / 1e12:.1f} + {count.vae / 1e12:.1f} + "
        f"{count.text / 1e12:.2f} TFLOP per pair, UNet : VAE : text {count.shares}, predicts {count.speedup:.3f}"
        for variant, count in sdxl_pair_flops(SDXL_RESOLUTION).items()
    ]


def main() -> None:
    options = parser(__doc__.splitlines()[0]).parse_args()
    size, variants = chosen_size(options), chosen_variants(options)
    with workplace(size) as folder:
        results = measure(size, folder, variants)
    print_results(results, f"published procedure / ours, size {size.name}", [] if options.quick else predictions())


if __name__ == "__main__":
    main()
