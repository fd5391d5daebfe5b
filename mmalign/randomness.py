"""Counter-based randomness: every random number is a function of (seed, purpose, identity, draw).

Neither rank, batch position, worker nor call order enters the key, so two processes draw what one would, a resumed run
continues exactly, and a cached reference score belongs to the very noise it was computed with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

GOLDEN_RATIO_FRACTION = 0.6180339887498949


def key(seed: int, purpose: str, identity: str, draw: int = 0) -> int:
    """A 63-bit integer that depends on all four arguments and on nothing else."""
    text = f"{seed}\x1f{purpose}\x1f{identity}\x1f{draw}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, identity: str, draw: int = 0) -> torch.Generator:
    """A CPU generator for one purpose. CPU, so that the numbers do not depend on the accelerator."""
    return torch.Generator().manual_seed(key(seed, purpose, identity, draw))


def normal(shape: tuple[int, ...], seed: int, purpose: str, identity: str, draw: int = 0) -> torch.Tensor:
    """Standard normal noise of `shape`, fp32, on the CPU."""
    return torch.randn(shape, generator=generator(seed, purpose, identity, draw))


def uniform(seed: int, purpose: str, identity: str, draw: int = 0) -> float:
    """One number in [0, 1)."""
    return key(seed, purpose, identity, draw) / 2**63


def stratified_uniform(seed: int, purpose: str, identity: str, draw: int) -> float:
    """One number in [0, 1), uniform over identities and evenly spread over successive draws of one identity.

    Each identity has a random offset; its draws walk the golden-ratio sequence, so that any run of n draws covers
    [0, 1) with gaps of order 1/n whatever n is (no stratum count to choose).
    """
    return (uniform(seed, purpose, identity) + draw * GOLDEN_RATIO_FRACTION) % 1.0


@contextmanager
def global_seed(seed: int, purpose: str, identity: str) -> Iterator[None]:
    """Seed torch's global CPU generator inside the block, for libraries that take none (PEFT's initialisation)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, purpose, identity))
        yield


def seed_process(seed: int, rank: int) -> None:
    """Seed what a user's plug-in may draw from globally. Nothing of ours does."""
    torch.manual_seed(key(seed, "process", "", rank))
