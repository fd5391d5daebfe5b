"""What a model family must offer the core: the policy protocol.

A new model implements these verbs; a new method never touches one. Shape legend: R score requests, K draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.nn import Parameter

    from mmalign.config import EmaConfig
    from mmalign.diffusion.kernels import Steps
    from mmalign.policies.rollouts import Replay, Trajectory
    from mmalign.types import Answer, ImageRef, Request, Row, Sample, Score, Side

View = Literal["policy", "reference", "ema"]


class Policy(Protocol):
    """A model that can be aligned. `score` serves offline methods; `sample` serves evaluation and data building."""

    name: str
    device: Any
    default_guidance_scale: float
    default_num_steps: int
    resolution: int
    attention: str
    modality: Literal["image", "text"]
    """What targets and samples are."""
    unread: tuple[str, ...]
    """Config keys that mean nothing to this family; setting one is an error."""
    network: nn.Module
    """What a training forward goes through; the loop replaces it by its DDP wrapper."""

    def encode_key(self, kind: Literal["image", "prompt"]) -> str:
        """Identity of the frozen encoder and its settings; part of every cache key, so that a change invalidates."""

    def encode_prompts(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Frozen text features, one record of CPU tensors per prompt. Cacheable."""

    def encode_images(self, images: Sequence[PreparedImage]) -> list[dict[str, Tensor]]:
        """Frozen image features (diffusion: posterior mean and log-variance), one record of CPU tensors per image."""

    def score(self, requests: Sequence[Request]) -> Score:
        """Score R requests in one batch; gradients flow to the trainable parameters of the current view."""

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        guidance_scale: float,
        num_steps: int,
    ) -> list[Sample]:
        """One image per (prompt, seed). The initial noise depends on (prompt, seed) alone: same for every view."""

    def view(self, name: View) -> AbstractContextManager[None]:
        """The one way to switch weights."""

    def trainable(self) -> Iterable[tuple[str, Parameter]]:
        """Named trainable parameters (fp32)."""

    def modules(self) -> dict[str, nn.Module]:
        """Modules by role under the current view: for parameter counts, memory estimates and fingerprints."""

    def start_ema(self, config: EmaConfig) -> Any:
        """Start the moving average behind the `ema` view and return it (`step`, `shadow_params`)."""

    def release_reference(self) -> None:
        """Free a second copy of the weights, if there is one; the view builds it again when asked for."""

    def release_encoders(self) -> list[str]:
        """Take frozen encoders off the device, because features are cached; they come back when used.

        Returns the roles (keys of `modules`) that left, empty where none can. Changes no feature, score or sample.
        """

    def reference_fingerprint(self) -> str:
        """Identity of the weights as loaded, before any training step."""

    def export(self, folder: Path) -> None:
        """Write the current view in the field's format: a LoRA file or a full pipeline folder."""


class ImagePolicy(Policy, Protocol):
    """A policy whose targets are images: what denoisers offer on top."""

    def cut_prompts(self, prompts: Iterable[str]) -> set[str]:
        """Those of `prompts` that no text encoder reads to the end."""


class StepPolicy(ImagePolicy, Protocol):
    """A policy whose sampling steps are Gaussians: what policy-gradient methods ask for on top."""

    kernels: tuple[str, ...]
    """What its sampling steps can be (`mmalign.diffusion.kernels`)."""

    def rollout_steps(self, *, kernel: str, level: float, num_steps: int, stochastic_S: Tensor | None = None) -> Steps:
        """The transitions of a rollout. Raises `ValueError` for a kernel that does not fit the model."""

    def rollout(self, contexts: Sequence[Any], **plan: Any) -> Trajectory:
        """Sample and record, see `mmalign.policies.rollouts.rollout` for the plan."""

    def replayer(self, trajectory: Trajectory) -> Callable[[int], Replay]:
        """Recorded steps under the current view and weights."""

    def decode(self, latents: Tensor) -> list[Any]:
        """Finished latents to PIL images."""


class TextPolicy(Policy, Protocol):
    """A policy whose targets are texts: what language models offer on top."""

    truncated: set[str]
    """Ids of rows that were cut to `data.max_length`."""

    def tokenize(self, row: Row, side: Side) -> tuple[Tensor, Tensor]:
        """Prompt and response ids, image placeholders expanded. Raises `DataError` for a row that cannot be used."""

    def num_image_tokens(self, size: tuple[int, int]) -> int:
        """Placeholders of an image of (height, width)."""

    def answer(
        self, rows: Sequence[Row], seeds: Sequence[int], *, temperature: float, max_new_tokens: int
    ) -> list[Answer]:
        """One answer per (row, seed). Its randomness depends on (row id, seed) alone: same for every view."""


class PreparedImage(Protocol):
    """An image after resize, crop and flip: `pixels` uint8 [H, W, 3] plus the sizes SDXL conditions on."""

    pixels: Any
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]


__all__ = ["ImagePolicy", "ImageRef", "Policy", "PreparedImage", "StepPolicy", "TextPolicy", "View"]
