"""Preference learning from pairs: any weighted sum of losses on scores (Diffusion-DPO, Flow-DPO, MaPO, DPO, mDPO, SFT).

Shape legend: B rows, Q request kinds (`chosen`, `rejected`, `negative`: the chosen target under the image negative),
R = Q·B requests ordered kind by kind.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmalign import registry
from mmalign.types import Batch, DataError, LossPart, Request, Row, Score, ScoreKind

KINDS = ("chosen", "rejected", "negative")
INPUTS = ("preference_B", "chosen_length_B", *(f"{kind}_{what}_B" for kind in KINDS for what in ("ratio", "score")))


@dataclass(frozen=True)
class Term:
    """One loss of the sum: its function with settings bound, its weight, and the inputs it asks for by name."""

    name: str
    weight: float
    function: Callable[..., Tensor]
    inputs: tuple[str, ...]
    golden: float | None
    accepts: frozenset[str]

    @property
    def compares(self) -> bool:
        return any(name.startswith("rejected") for name in self.inputs)


class Preference:
    """Weighted sum of preference losses.

    Args:
        losses: terms `{name, weight, …settings of the loss}`; `name` is registered, package.module:Name or file.py:Name.
        guidance_scale: score the prediction under classifier-free guidance, as the samples will be drawn; 1 is without,
            as published. Denoisers only; above 1 only with `experimental`.
        experimental: allow what no paper defines.
    """

    loop = "offline"

    def __init__(
        self, *, losses: list[dict[str, Any]], guidance_scale: float = 1.0, experimental: bool = False
    ) -> None:
        if not losses:
            raise ValueError("method.losses is empty: name at least one loss, e.g. [{name: dpo, beta: 5000}]")
        if not 1 <= guidance_scale < math.inf:
            raise ValueError(
                f"guidance_scale = {guidance_scale}: must be at least 1 (1 is without guidance) and finite"
            )
        if experimental != (guidance_scale > 1):
            raise ValueError(
                f"experimental = {experimental} with guidance_scale = {guidance_scale}: no paper of these "
                f"losses scores under guidance, so a scale above 1 needs experimental: true, and nothing else does"
            )
        self.guidance_scale = guidance_scale
        self.terms = [make_term(dict(loss)) for loss in losses]
        asked = {name for term in self.terms for name in term.inputs}
        self.needs_reference = any(name.endswith("_ratio_B") for name in asked)
        self.needs_rejected = any(name.startswith("rejected") for name in asked)
        self.needs_negative = any(name.startswith("negative") for name in asked)
        self.sides = ("chosen", *(("rejected",) * self.needs_rejected))
        self.kinds = (*self.sides, *(("negative",) * self.needs_negative))
        # Losses that cannot read how sure the label is.
        self._unsure = [term for term in self.terms if "preference_B" not in term.inputs]

    @property
    def golden_loss(self) -> float | None:
        """The loss at step 0, where policy = reference; None if a term declares none."""
        values = [term.golden for term in self.terms]
        return None if None in values else sum(t.weight * t.golden for t in self.terms if t.golden is not None)

    @property
    def accepts(self) -> frozenset[str]:
        """Score kinds every term is defined for."""
        return functools.reduce(frozenset.__and__, (term.accepts for term in self.terms))

    @property
    def requests_per_row(self) -> int:
        return len(self.kinds)

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Refuse, before training, rows that the losses would misread. Raises `DataError` naming the first."""
        paired = [row for row in rows if row.rejected is not None]
        if self.needs_rejected and len(paired) != len(rows):
            lone = next(row for row in rows if row.rejected is None)
            raise DataError(
                f"{lone.source}: no `rejected`, but the configured losses compare pairs. Leave such rows out, or train on "
                f"them with method.preset=sft"
            )
        if paired and len(paired) != len(rows):
            raise DataError("rows with and without `rejected` are mixed; use one kind per run")
        for row in paired:
            if row.preference == 1:
                continue
            # The likelier of two is still worth imitating (sft, anchor); a tie has no winner.
            misread = [term.name for term in self._unsure if term.compares or row.preference <= 0.5]
            if misread:
                raise DataError(
                    f"{row.source}: preference {row.preference}, but {', '.join(misread)} would count it as a win of "
                    f"`chosen`. Set data.options.ties=drop or use dpo alone, which reads soft labels"
                )

    def requests(self, batch: Batch) -> list[Request]:
        sides = {
            "chosen": (batch.context, batch.chosen),
            "rejected": (batch.context, batch.rejected),
            "negative": (batch.negative, batch.chosen),
        }
        return [
            Request(context, target, keys, self.guidance_scale)
            for kind in self.kinds
            for context, target, keys in zip(*sides[kind], batch.keys, strict=True)
        ]

    def logged(self, kind: ScoreKind) -> tuple[str, ...]:
        """Names of the metrics of `loss` for scores of this kind, taken from the loss of one made-up row."""
        num_requests = len(self.kinds)
        score_R = torch.full((num_requests,), -0.1)
        length_R = torch.ones(num_requests) if kind == "exact" else None
        batch = Batch([Row("", "")], [None], [None], [None], [None], [()], torch.ones(1), [(0, 0)])
        score = Score(score_R, score_R[:, None], kind, length_R)
        return tuple(self.loss(batch, score, score_R if self.needs_reference else None).metrics)

    def loss(self, batch: Batch, policy: Score, reference_R: Tensor | None) -> LossPart:
        """Unreduced loss `[B]` from the policy's scores and, where needed, the reference's.

        The number to watch is how the winner fares, `chosen_error_delta` or `chosen_logp_delta` (against the reference):
        implicit accuracy rises in every run, also in useless ones.
        """
        size = len(batch)
        score_R = policy.value_R
        # What people read: a squared error for diffusion and flow, nats for tokens.
        unit, factor = ("logp", 1) if policy.kind == "exact" else ("error", -2)
        values: dict[str, Tensor] = {"preference_B": batch.preference_B.to(score_R.device)}
        metrics: dict[str, Tensor] = {}
        for index, kind in enumerate(self.kinds):
            here = slice(index * size, (index + 1) * size)
            values[f"{kind}_score_B"] = score_R[here]
            metrics[f"{kind}_{unit}"] = factor * score_R[here]
            if reference_R is not None:
                ratio_B = score_R[here] - reference_R[here].to(score_R.device)
                values[f"{kind}_ratio_B"] = ratio_B
                metrics[f"{kind}_{unit}_delta"] = factor * ratio_B
        if policy.num_tokens_R is not None:
            values["chosen_length_B"] = policy.num_tokens_R[:size].to(score_R.device)
            metrics["chosen_length"] = values["chosen_length_B"].float()
        what = "ratio" if reference_R is not None else "score"
        # negative: does the true image explain the answer better than the corrupted one (mDPO's "imageless" accuracy)
        for other, accuracy, margin in (
            ("rejected", "implicit_accuracy", "margin"),
            ("negative", "image_accuracy", "image_margin"),
        ):
            if other in self.kinds:
                margin_B = values[f"chosen_{what}_B"] - values[f"{other}_{what}_B"]
                metrics[accuracy] = (torch.sign(margin_B) + 1) / 2
                metrics[margin] = margin_B
        loss_B = torch.zeros(size, device=score_R.device)
        for term in self.terms:
            term_B = term.function(**{name: values[name] for name in term.inputs})
            if term_B.shape != loss_B.shape:
                raise ValueError(
                    f"loss {term.name!r} returned shape {tuple(term_B.shape)}, expected ({size},) unreduced"
                )
            metrics[f"loss_{term.name}"] = term_B
            loss_B = loss_B + term.weight * term_B
        return LossPart(loss_B, {name: value.detach() for name, value in metrics.items()})


def make_term(spec: dict[str, Any]) -> Term:
    """A validated term. Raises `ValueError` naming the loss and what is wrong with its settings."""
    name = spec.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"a loss needs a `name`; got {spec!r}. Losses: {', '.join(registry.names('loss'))}")
    weight = float(spec.pop("weight", 1.0))
    function = registry.resolve("loss", name)
    settings = registry.check_options("loss", name, function, spec)
    inputs = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            continue
        if parameter.name not in INPUTS:
            raise ValueError(f"loss {name!r} asks for {parameter.name!r}; a loss may ask for {', '.join(INPUTS)}")
        inputs.append(parameter.name)
    bound = functools.partial(function, **settings)
    accepts = frozenset(getattr(function, "accepts", ("exact", "surrogate")))
    golden = getattr(function, "golden", None)
    golden = golden(**settings) if callable(golden) else golden
    term = Term(name, weight, bound, tuple(inputs), golden, accepts)
    probe = {name: torch.ones(1) if name == "chosen_length_B" else torch.full((1,), -0.1) for name in inputs}
    bound(**probe)  # settings out of range fail now, not after loading
    return term
