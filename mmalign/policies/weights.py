"""Loading of weights, with errors that say what to do, and their identity."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn

T = TypeVar("T")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_argument(dtype: torch.dtype) -> dict[str, Any]:
    """The dtype keyword of diffusers' `from_pretrained`: renamed in 0.42."""
    import diffusers

    major, minor = (int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (0, 42) else "torch_dtype": dtype}


def load_or_explain(path: str, load: Callable[[], T]) -> T:
    """Run a hub or disk loader; turn its many failures into one line that names the path and the fix."""
    try:
        return load()
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        raise ValueError(
            f"cannot load {path!r}: {text[:400]}. Give a local folder, a hub id, or builtin:NAME"
        ) from error


def weights_hash(modules: dict[str, nn.Module], salt: str) -> str:
    """Hash of all weights: the cache must notice another VAE behind the same path."""
    digest = hashlib.blake2b(salt.encode(), digest_size=12)
    for role, module in modules.items():
        for name, tensor in module.state_dict().items():
            digest.update(f"{role}.{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
