"""Stable Diffusion XL: two text encoders, pooled text and size/crop ids as added conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.policies.diffusion import DiffusionPolicy


class StableDiffusionXL(DiffusionPolicy):
    """SDXL base. Sampling defaults: guidance 5, 50 steps (Diffusion-DPO notebook).

    time_ids are (original height, original width, crop top, crop left, target height, target width). With
    `data.size_ids: true` each image brings its own size and crop, as the diffusers and MaPO scripts do; with `target` they
    are (res, res, 0, 0, res, res), as in Salesforce's script. Pick-a-Pic images are mostly smaller than 1024, so the
    choice decides whether upsampled blur is declared to the network.
    """

    name = "sdxl"
    pipeline_class = "StableDiffusionXLPipeline"
    default_guidance_scale = 5.0

    def encode_text(self, prompts: list[str]) -> list[dict[str, Tensor]]:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return [{"embeds": e, "pooled": p} for e, p in zip(embeds, pooled, strict=True)]

    def conditioning(
        self, contexts: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Any]:
        size = float(self.resolution)
        if self.size_ids == "true":
            ids = [[*target["size"].tolist(), size, size] for target in targets]
        else:
            ids = [[size, size, 0.0, 0.0, size, size]] * len(targets)
        return {
            "encoder_hidden_states": self.stack(contexts, "embeds"),
            "added_cond_kwargs": {
                "text_embeds": self.stack(contexts, "pooled"),
                "time_ids": torch.tensor(ids, device=self.device),
            },
        }

    def unconditional(self) -> dict[str, Tensor]:
        record = super().unconditional()
        if self.pipe.config.get("force_zeros_for_empty_prompt", True):
            return {name: torch.zeros_like(value) for name, value in record.items()}
        return record
