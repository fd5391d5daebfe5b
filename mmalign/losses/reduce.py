"""From unreduced losses to the number that is differentiated: one weighted sum over one global denominator.

Dropped samples (NaN reward, zero variance, padding) have weight 0 and stay in the batch: removing rows would leave
ranks with different numbers of backward passes, and a mean per micro-batch would depend on how samples were dealt out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(value: Tensor, weight: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """Σ weight · value / denominator, a scalar.

    Args:
        value: `[B]` or `[B, S]`. weight: same shape, or `[B]` for all steps of a sample alike; ≥ 0. Where it is 0 the
            value does not count, be it NaN (its gradient must be finite: zero times NaN is NaN further back).
        denominator: the weights' sum over everything one optimiser step sees: all micro-batches, all ranks. Default:
            the sum over this call.

    The parts of one optimiser step add up to the mean over it. Where gradients are averaged over ranks (DDP), the
    caller multiplies by their number. A denominator of 0 (every sample dropped) gives 0.
    """
    weight = weight.to(value.dtype)
    weight = weight.view(weight.shape + (1,) * (value.ndim - weight.ndim)).expand_as(value)
    total = (torch.where(weight > 0, value, torch.zeros_like(value)) * weight).sum()
    if denominator is None:
        denominator = weight.sum()
    if isinstance(denominator, Tensor):
        return total / torch.where(denominator > 0, denominator, torch.ones_like(denominator))
    return total / (denominator if denominator > 0 else 1.0)  # a number stays on the host: no transfer, no wait
