"""CLIP score: cosine between the image and its prompt (Hessel et al. 2021, arXiv 2104.08718; PickScore v1 likewise)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .clip_model import Dtype, ModelSpec, load_clip

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image
    from torch import Tensor

RANGES = {"cosine": (-1.0, 1.0), "torchmetrics100": (-100.0, 100.0), "clipscore2.5": (0.0, 2.5)}


class Clip:
    """How well an image fits its prompt, by CLIP. The default is a tiny CLIP of the synthetic world: give `model` for
    photographs, e.g. openai/clip-vit-large-patch14.

    Args:
        model: `builtin:NAME`; a folder or hub id in transformers format; an open_clip folder, `local-dir:FOLDER` or
            `hf-hub:ID`; or [architecture, pretrained] of open_clip, e.g. [ViT-L-14-quickgelu, openai].
        scale: `cosine`; `torchmetrics100` = 100·cosine (the mean over a set is torchmetrics' CLIPScore);
            `clipscore2.5` = 2.5·max(cosine, 0), the paper's.
        dtype: precision of the towers; norms and the dot product are fp32.
        batch_size: images per forward.
    """

    needs_prompt = True

    def __init__(
        self,
        *,
        model: ModelSpec = "builtin:clip-tiny",
        scale: Literal["cosine", "torchmetrics100", "clipscore2.5"] = "cosine",
        dtype: Dtype = "fp32",
        batch_size: int = 32,
        device: str = "cpu",
    ) -> None:
        self.clip = load_clip(model, dtype=dtype, device=device)
        self.scale = scale
        self.range = RANGES[scale]
        self.batch_size = batch_size

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        cosine_N = (self.clip.images(images) * self.clip.texts(prompts)).sum(dim=-1).clamp(-1.0, 1.0)
        if self.scale == "torchmetrics100":
            return 100.0 * cosine_N
        if self.scale == "clipscore2.5":
            return 2.5 * cosine_N.clamp(min=0.0)
        return cosine_N

    def fingerprint(self) -> str:
        return self.clip.fingerprint()
