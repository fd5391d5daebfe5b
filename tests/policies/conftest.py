"""Loaded tiny policies, shared per module: loading costs more than most assertions here."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmalign.config import LoraConfig, ModelConfig
from mmalign.policies.load import load_policy
from mmalign.types import DrawKey, Request

FAMILIES = {"sdxl": "builtin:sdxl-tiny", "sd15": "builtin:sd15-tiny"}


@pytest.fixture
def load() -> Callable[..., Any]:
    """`load("sdxl", lora=True, dtype="bf16", …)`: a fresh tiny policy."""

    def make(family: str = "sdxl", *, lora: bool | dict = False, train: bool = True, **model: Any) -> Any:
        adapter = None if lora is False else LoraConfig(**({"rank": 4, "targets": "all"} if lora is True else lora))
        config = ModelConfig(family=family, path=FAMILIES[family], lora=adapter, **model)
        return load_policy(config, device="cpu", train=train)

    return make


@pytest.fixture
def requests_for() -> Callable[..., list[Request]]:
    """Requests on random images: `requests_for(policy, num, num_draws)`, alternating between two prompts."""

    def make(policy: Any, num: int = 4, num_draws: int = 1, prompts: tuple[str, str] = PROMPTS) -> list[Request]:
        generator = np.random.default_rng(0)
        size = policy.resolution
        images = [
            SimpleNamespace(
                pixels=generator.integers(0, 255, (size, size, 3), dtype=np.uint8),
                original_size=(size, size),
                crop_top_left=(0, 0),
            )
            for _ in range(num)
        ]
        contexts = policy.encode_prompts(list(prompts))
        targets = policy.encode_images(images)
        return [
            Request(contexts[i % 2], target, [DrawKey(0, f"row-{i // 2}", draw) for draw in range(num_draws)])
            for i, target in enumerate(targets)
        ]

    return make


PROMPTS = ("a large red circle on a white background", "a small blue square on a black background")


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)
