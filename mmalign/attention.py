"""Attention kernels: what was asked for, what works here, what is really used.

xformers is tried on the device before it is believed: an import that succeeds proves nothing about its kernels.
"""

from __future__ import annotations

import functools
import logging
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch

Backend = Literal["auto", "sdpa", "xformers", "flash"]


@dataclass(frozen=True)
class Availability:
    """Whether a backend works on a device, and why not."""

    backend: str
    usable: bool
    detail: str


def quiet_xformers() -> None:
    """xformers prints a build warning in every process that imports a diffusers model; `doctor` reports the real state."""
    logging.getLogger("xformers").setLevel(logging.ERROR)


@functools.lru_cache
def probe(backend: str, device_type: str) -> Availability:
    """Run the kernel once on a tiny input, forward and backward."""
    if backend == "sdpa":
        return Availability("sdpa", True, "torch.nn.functional.scaled_dot_product_attention")
    if device_type != "cuda":
        return Availability(backend, False, f"has no {device_type} kernel")
    query = torch.ones(1, 16, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if backend == "xformers":
                quiet_xformers()
                import xformers
                import xformers.ops

                xformers.ops.memory_efficient_attention(query, query, query).sum().backward()
                return Availability(backend, True, f"xformers {xformers.__version__}")
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
                heads = query.transpose(1, 2)
                torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).sum().backward()
            return Availability(backend, True, "PyTorch flash attention through SDPA")
    except Exception as error:  # a kernel fails in its own way on each card; the text goes to the user
        return Availability(backend, False, f"{type(error).__name__}: {str(error).splitlines()[0]}")


def select(requested: Backend, device: torch.device, dtype: torch.dtype) -> str:
    """The backend to use: `sdpa`, `xformers` or `flash`.

    Raises `ValueError` when an explicit request cannot run here; `auto` never fails.
    """
    if requested == "sdpa":
        return "sdpa"
    if requested == "auto":
        return "xformers" if probe("xformers", device.type).usable else "sdpa"
    found = probe(requested, device.type)
    if not found.usable:
        raise ValueError(
            f"model.attention = {requested!r} cannot run on {device}: {found.detail}. "
            f"Use `auto` or `sdpa`, or run on a CUDA GPU"
        )
    if requested == "flash" and dtype == torch.float32:
        raise ValueError("model.attention = 'flash' needs model.dtype bf16 or fp16; with fp32 use `auto` or `sdpa`")
    return requested


def apply(module: Any, backend: str) -> None:
    """Set the backend on a freshly loaded diffusers model, whose own default is SDPA."""
    if backend == "xformers":
        module.enable_xformers_memory_efficient_attention()
    elif backend == "flash":
        processors = getattr(module, "attn_processors", {}).values()
        if not any(hasattr(processor, "_attention_backend") for processor in processors):
            raise ValueError(
                f"model.attention = 'flash' has no effect on {type(module).__name__}, whose attention goes through SDPA. "
                f"Use `sdpa`: PyTorch picks its flash kernel there by itself"
            )
        module.set_attention_backend("_native_flash")
