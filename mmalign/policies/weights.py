"""Identity of weights."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_hash(modules: dict[str, nn.Module], salt: str) -> str:
    """Hash of all weights: the cache must notice another VAE behind the same path."""
    digest = hashlib.blake2b(salt.encode(), digest_size=12)
    for role, module in modules.items():
        for name, tensor in module.state_dict().items():
            digest.update(f"{role}.{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
