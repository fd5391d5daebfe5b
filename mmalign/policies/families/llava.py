"""LLaVA-1.5 and what looks like it: a CLIP or SigLIP tower, a two-layer projector, a language model of any kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmalign.policies.tokens import TokenPolicy


class Llava(TokenPolicy):
    """LLaVA. The features of an image are hidden states of the vision tower, chosen as the model's config says."""

    name = "llava"
    model_type = "llava"

    def count_image_tokens(self, prepared: dict[str, Tensor]) -> int:
        height, width = prepared["pixel_values"].shape[-2:]
        # Copies of LLaVA-1.5 from before mid 2024 have a processor without these settings.
        patch = self.processor.patch_size or self.model_config.vision_config.patch_size
        num_patches = (height // patch) * (width // patch)
        num_dropped = 1 if self.model_config.vision_feature_select_strategy == "default" else 0
        return num_patches + self.processor.num_additional_image_tokens - num_dropped

    def vision_features(self, prepared: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        vision = self.parts(self.model).vision
        pixels = torch.cat([inputs["pixel_values"] for inputs in prepared]).to(self.device, self.dtype)
        states = vision(pixels, output_hidden_states=True).hidden_states
        layers = self.model_config.vision_feature_layer
        chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        if self.model_config.vision_feature_select_strategy == "default":
            chosen = [state[:, 1:] for state in chosen]
        return list(torch.cat(chosen, dim=-1))

    def image_fingerprint(self) -> str:
        config = self.model_config
        layers = f"{config.vision_feature_layer}:{config.vision_feature_select_strategy}"
        return f"{super().image_fingerprint()}:{layers}"
