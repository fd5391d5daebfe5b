"""Losses as pure functions of tensors: unreduced, no config, no model, no logging.

`preference.py` holds the losses on scores (`[B]` in, `[B]` out), `policy_gradient.py` those on the log-probs of steps
(`[B, S]`), `reduce.py` the one weighted mean with a global denominator. A preference loss asks for its inputs by
parameter name; the method passes what is asked for (`INPUTS` in trainers/preference.py lists the names) and the
keyword-only parameters are its settings. To add one, write a function with these names and point a config at it:
`losses: [{name: ./my_loss.py:mine, beta: 1}]`.

Every score is −½ · mean squared error for diffusion and flow (fp32), summed nats for tokens.
"""

from mmalign.losses.policy_gradient import clipped_surrogate, ratio_stats
from mmalign.losses.preference import anchor, copo, dpo, mapo, mapo_paper, nll, sft
from mmalign.losses.reduce import masked_mean

__all__ = [
    "anchor",
    "clipped_surrogate",
    "copo",
    "dpo",
    "mapo",
    "mapo_paper",
    "masked_mean",
    "nll",
    "ratio_stats",
    "sft",
]
