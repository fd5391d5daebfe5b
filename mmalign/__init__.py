"""mmalign: preference alignment for image and video diffusion/flow models and multimodal language models."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["Config", "load_config", "load_policy", "train"]

_LAZY = {
    "Config": "mmalign.config:Config",
    "load_config": "mmalign.config:load_config",
    "load_policy": "mmalign.policies.load:load_policy",
    "train": "mmalign.cli:train",
}


def __getattr__(name: str) -> Any:
    """Attributes are imported on first use, so that `import mmalign` stays light."""
    import importlib

    if name in _LAZY:
        module, _, attribute = _LAZY[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'mmalign' has no attribute {name!r}")
