"""Stable Diffusion 3 and 3.5: an MMDiT on two CLIP encoders and, optionally, T5."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmalign.policies.flow import FlowPolicy


class StableDiffusion3(FlowPolicy):
    """SD3 and SD3.5. Sampling defaults: guidance 7, 28 steps (diffusers' pipeline); SD3.5-M is usually run at 4.5, 40.

    Without T5 (`model.without: [text_encoder_3, tokenizer_3]`, or a pipeline that has none) the pipeline puts zeros in
    the place of its tokens; `model.max_sequence_length` says how many.
    """

    name = "sd3"
    pipeline_class = "StableDiffusion3Pipeline"
    unread = (*FlowPolicy.unread, "data.size_ids")
    untouched = ("pos_embed.proj", "proj_out")
    default_guidance_scale = 7.0
    default_num_steps = 28

    def encode_text(self, prompts: list[str]) -> list[dict[str, Tensor]]:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            **self.sampling_options(),
        )
        return [{"embeds": e, "pooled": p} for e, p in zip(embeds, pooled, strict=True)]

    def conditioning(
        self, contexts: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Any]:
        return {
            "encoder_hidden_states": self.stack(contexts, "embeds"),
            "pooled_projections": self.stack(contexts, "pooled"),
        }

    def sampling_options(self) -> dict[str, Any]:
        model = self.config
        return {} if model.max_sequence_length is None else {"max_sequence_length": model.max_sequence_length}

    def prompt_limits(self) -> dict[str, int]:
        limits = super().prompt_limits()
        if "text_encoder_3" in limits:
            default = inspect.signature(self.pipe.encode_prompt).parameters["max_sequence_length"].default
            limits["text_encoder_3"] = self.config.max_sequence_length or default
        return limits

    def tokenizer_fingerprint(self) -> str:
        return f"{super().tokenizer_fingerprint()}:{self.config.max_sequence_length}"
