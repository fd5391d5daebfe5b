"""Stable Diffusion 1.x (and 2.x): one CLIP text encoder, cross-attention only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmalign.policies.diffusion import DiffusionPolicy


class StableDiffusion(DiffusionPolicy):
    """SD1.x. Sampling defaults: guidance 7.5, 50 steps (Diffusion-DPO notebook)."""

    name = "sd15"
    pipeline_class = "StableDiffusionPipeline"
    unread = (*DiffusionPolicy.unread, "data.size_ids")
    default_guidance_scale = 7.5

    def load_options(self, pipeline_config: dict[str, Any]) -> dict[str, Any]:
        # The safety checker replaces images by black ones: it would turn into a silent reward.
        return {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}

    def encode_text(self, prompts: list[str]) -> list[dict[str, Tensor]]:
        embeds, _ = self.pipe.encode_prompt(prompts, self.device, 1, False)
        return [{"embeds": embed} for embed in embeds]

    def conditioning(
        self, contexts: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Any]:
        return {"encoder_hidden_states": self.stack(contexts, "embeds")}
