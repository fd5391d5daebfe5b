"""Fixtures for runs on the bundled tiny SDXL: small, real, evaluated only where a test asks for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A config mapping; keyword arguments update sections: `tiny(train={"steps": 3}, output_dir=…)`."""

    def make(**sections: Any) -> dict[str, Any]:
        config: dict[str, Any] = {
            "model": {"family": "sdxl", "path": "builtin:sdxl-tiny"},
            "method": {"preset": "diffusion_dpo"},
            "data": {"path": "builtin:synthetic", "format": "synthetic", "options": {"num_pairs": 24}},
            "train": {"steps": 4, "batch_size": 2, "learning_rate": 1e-4},
            "run": {"log_every": 1, "tracker": "none"},
            "output_dir": str(tmp_path / "run"),
        }
        for name, value in sections.items():
            config[name] = {**config[name], **value} if isinstance(value, dict) and name in config else value
        return config

    return make
