"""Preference losses on scores, shared by diffusion, flow and token policies.

Shape legend: B rows. A score s is −½ · mean squared error in the network's own prediction space (diffusion, flow) or
summed nats (tokens). A ratio is ρ = s − s_ref, the log-likelihood ratio to the reference (surrogate or exact).
Nothing is reduced: the caller averages.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

LN2 = math.log(2)
Loss = TypeVar("Loss", bound=Callable[..., Tensor])


def declares(
    *, golden: float | Callable[..., float] | None, accepts: tuple[str, ...] = ("exact", "surrogate")
) -> Callable[[Loss], Loss]:
    """What is known of a loss beforehand: its value at step 0 (policy = reference; a function of the settings where it
    depends on them) and the score kinds it is defined for."""

    def mark(function: Loss) -> Loss:
        function.golden = golden  # type: ignore[attr-defined]
        function.accepts = accepts  # type: ignore[attr-defined]
        return function

    return mark


@declares(golden=LN2)
def dpo(
    chosen_ratio_B: Tensor,
    rejected_ratio_B: Tensor,
    preference_B: Tensor | None = None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    robust: bool = False,
) -> Tensor:
    """Direct preference optimisation: −log σ(h), h = β(ρ_w − ρ_l).

    With label noise ε the two forms are
    cDPO: −(1−ε) log σ(h) − ε log σ(−h), and robust: (−(1−ε) log σ(h) + ε log σ(−h)) / (1−2ε).

    Args:
        chosen_ratio_B, rejected_ratio_B: ρ of the preferred and the other sample, `[B]`.
        preference_B: probability that `chosen` is preferred, `[B]` in [0, 1]; ½ is a tie. Default 1.
        beta: inverse temperature in units of 1/score. On diffusion scores β = 5000 is Diffusion-DPO as published for
            SDXL (the ½ sits in the score); on summed nats 0.1 is usual.
        label_smoothing: ε in [0, ½), assumed share of flipped labels.
        robust: unbiased rDPO form instead of conservative cDPO.

    Returns `[B]`; ln 2 everywhere at ρ = 0, whatever ε.
    Raises `ValueError` on β ≤ 0 or ε outside [0, ½).
    Source: Diffusion-DPO arXiv 2311.12908 (released code; the pseudocode sums errors where the code averages them);
    cDPO: E. Mitchell, "A note on DPO with noisy preferences" (2023); robust: arXiv 2403.00409.
    """
    if not beta > 0:
        raise ValueError(f"beta = {beta}: must be positive (diffusion scores: about 2000 to 5000, nats: about 0.1)")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing = {label_smoothing}: must be in [0, 0.5); at 0.5 labels carry nothing")
    h_B = beta * (chosen_ratio_B.float() - rejected_ratio_B.float())
    right_B, wrong_B = -F.logsigmoid(h_B), -F.logsigmoid(-h_B)
    if preference_B is not None:
        p_B = preference_B.float()
        right_B, wrong_B = p_B * right_B + (1 - p_B) * wrong_B, p_B * wrong_B + (1 - p_B) * right_B
    if robust:
        return ((1 - label_smoothing) * right_B - label_smoothing * wrong_B) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right_B + label_smoothing * wrong_B


@declares(golden=LN2, accepts=("exact",))
def copo(chosen_ratio_B: Tensor, negative_ratio_B: Tensor, *, beta: float) -> Tensor:
    """mDPO's image contrast: `dpo` between the image and its negative under one and the same chosen response.

    −log σ(β(ρ(m_w, y_w) − ρ(m_l, y_w))): the true image must explain the response better than the negative does.

    Args:
        chosen_ratio_B, negative_ratio_B: ρ of the chosen response with the image and with its negative, `[B]`, nats.
        beta: as in `dpo`, 0.1 in the paper.

    Returns `[B]`; ln 2 at ρ = 0. Raises `ValueError` on β ≤ 0.
    Source: mDPO arXiv 2406.11839, eq. 5. The released code crops anew for policy and reference; here both see one crop,
    as the equation has it.
    """
    return dpo(chosen_ratio_B, negative_ratio_B, beta=beta)


@declares(golden=lambda *, delta, **_: math.log1p(math.exp(delta)))
def anchor(chosen_ratio_B: Tensor, *, beta: float, delta: float = 0.0) -> Tensor:
    """mDPO's anchor: −log σ(β ρ_w − δ) keeps the chosen response's likelihood from falling below the reference's.

    Args:
        chosen_ratio_B: ρ of the preferred sample, `[B]`.
        beta: as in `dpo`.
        delta: the reward that ρ_w has to exceed; 0 in the paper.

    Returns `[B]`; softplus(δ) at ρ = 0, i.e. ln 2 for δ = 0. Raises `ValueError` on β ≤ 0.
    Source: mDPO arXiv 2406.11839, eq. 6.
    """
    if not beta > 0:
        raise ValueError(f"beta = {beta}: must be positive")
    return -F.logsigmoid(beta * chosen_ratio_B.float() - delta)


@declares(golden=None, accepts=("surrogate",))
def mapo(
    chosen_score_B: Tensor,
    rejected_score_B: Tensor,
    *,
    margin_weight: float = 0.1,
    temperature: float = 1000.0,
    snr: float = 0.5,
) -> Tensor:
    """Margin-aware preference optimisation as released: L_w − margin_weight · log σ(temperature · (φ(snr·L_w) − φ(snr·L_l))).

    L = −2s is the error; φ(x) = x / (eˣ − 1) falls from φ(0) = 1. Reference-free: the winner's error plus a bounded margin.

    Args:
        chosen_score_B, rejected_score_B: scores, `[B]`, s ≤ 0.
        margin_weight: weight of the margin term beside the winner's error.
        temperature: the released code uses the number of training timesteps.
        snr: scale of the error; a constant in the released code, not a signal-to-noise ratio.

    Returns `[B]`. No golden value: it depends on the errors. Finite, with finite gradients, at zero error, where the
    logit's slope is −temperature·snr/2 = −250.
    Source: arXiv 2406.06424, the authors' released code. The paper's v2 has another form, see `mapo_paper`.
    """
    error_w_B, error_l_B = _errors(chosen_score_B, rejected_score_B)
    margin_B = temperature * (bose(snr * error_w_B) - bose(snr * error_l_B))
    return (error_w_B - margin_weight * F.logsigmoid(margin_B)).float()


@declares(golden=None, accepts=("surrogate",))
def mapo_paper(chosen_score_B: Tensor, rejected_score_B: Tensor, *, beta: float = 8.0) -> Tensor:
    """MaPO as printed in v2 of the paper: L_w − (1/β) · log σ(φ(L_w)^β − φ(L_l)^β).

    At small errors its margin term is about 50 times weaker against the winner term than the released code's.

    Args:
        chosen_score_B, rejected_score_B: scores, `[B]`, s ≤ 0.
        beta: the paper's Table 4 uses 8 for general preference up to 1024 for personalisation.

    Returns `[B]`. Raises `ValueError` on β ≤ 0.
    Source: arXiv 2406.06424v2, eq. 11, read as a power (a product would not keep the score in (0, 1) as stated there).
    """
    if not beta > 0:
        raise ValueError(f"beta = {beta}: must be positive (the paper uses 8 to 1024)")
    error_w_B, error_l_B = _errors(chosen_score_B, rejected_score_B)
    margin_B = bose(error_w_B) ** beta - bose(error_l_B) ** beta
    return (error_w_B - F.logsigmoid(margin_B) / beta).float()


@declares(golden=None, accepts=("exact",))
def nll(chosen_score_B: Tensor, chosen_length_B: Tensor) -> Tensor:
    """Supervised fine-tuning on the chosen response: its negative log-likelihood per token, in nats.

    Args:
        chosen_score_B: summed log-probabilities, `[B]`.
        chosen_length_B: response tokens, `[B]`.
    """
    return -chosen_score_B.float() / chosen_length_B.float()


@declares(golden=None, accepts=("surrogate",))
def sft(chosen_score_B: Tensor) -> Tensor:
    """Supervised fine-tuning on the winner: the error L_w = −2s for diffusion and flow (`nll` is its twin for tokens).

    As a term beside `dpo` it is the anchor that keeps the winner's error from rising.

    Args:
        chosen_score_B: scores of the preferred samples, `[B]`.
    """
    return -2 * chosen_score_B.float()


def _errors(chosen_score_B: Tensor, rejected_score_B: Tensor) -> tuple[Tensor, Tensor]:
    """L = −2s in float64: the temperature multiplies the rounding of φ (6e-8 in fp32) into the fifth digit of the logit."""
    dtype = torch.float32 if chosen_score_B.device.type == "mps" else torch.float64
    return -2 * chosen_score_B.to(dtype), -2 * rejected_score_B.to(dtype)


def bose(x: Tensor) -> Tensor:
    """φ(x) = x / (eˣ − 1) for x ≥ 0, exact to rounding down to 0, where φ = 1 and φ' = −½.

    `expm1` avoids the cancellation of `exp(x) − 1`; below 1e-4 the series 1 − x/2 + x²/12 is exact to 1e-18.
    """
    small = x < 1e-4
    safe = torch.where(small, torch.ones_like(x), x)
    return torch.where(small, 1 - x / 2 + x * x / 12, safe / torch.expm1(safe))
