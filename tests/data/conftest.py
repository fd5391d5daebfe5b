"""Images with a known content, rows and configs for the data tests."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmalign.config import DataConfig
from mmalign.types import ImageRef, Row


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    """picture(seed, width, height): smooth coloured noise, different for each seed."""

    def make(seed: int = 0, width: int = 24, height: int = 16) -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    return make


@pytest.fixture(scope="session")
def encoded(picture) -> Callable[..., bytes]:
    """encoded(seed, format, width, height): bytes of an image file."""

    def make(seed: int = 0, format: str = "PNG", **size: int) -> bytes:
        buffer = io.BytesIO()
        picture(seed, **size).save(buffer, format=format)
        return buffer.getvalue()

    return make


@pytest.fixture
def data_config() -> Callable[..., DataConfig]:
    def make(path: object = "unused", **keys: Any) -> DataConfig:
        return DataConfig(path=str(path), **keys)

    return make


@pytest.fixture(scope="session")
def make_rows(encoded) -> Callable[..., list[Row]]:
    """make_rows(n): pairs in memory; row i shows images 2i and 2i+1."""

    def make(number: int, **size: int) -> list[Row]:
        return [
            Row(
                id=f"row{i}",
                prompt=f"caption {i}",
                chosen=ImageRef(content=encoded(2 * i, **size), source=f"pairs:{i} chosen"),
                rejected=ImageRef(content=encoded(2 * i + 1, **size), source=f"pairs:{i} rejected"),
                source=f"pairs:{i}",
            )
            for i in range(number)
        ]

    return make


@pytest.fixture(scope="session")
def linear_policy() -> type:
    """The class of tests/data/linear_policy.py."""
    spec = importlib.util.spec_from_file_location("linear_policy", Path(__file__).with_name("linear_policy.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LinearPolicy
