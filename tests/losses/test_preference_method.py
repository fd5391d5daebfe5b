"""The method around the preference losses: what its presets pin, how terms add up, and what it logs.

Shape legend: B rows, R = kinds x B scores, ordered kind by kind.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mmalign.losses.preference import anchor, copo, dpo
from mmalign.trainers.preference import Preference
from mmalign.types import Batch, Row, Score

LN2 = math.log(2)


def plain_dpo(beta: float) -> tuple[str, dict[str, Any]]:
    return "dpo", {"beta": beta, "label_smoothing": 0.0, "robust": False}


PRESETS: dict[str, tuple[list[tuple[str, dict[str, Any]]], float | None]] = {
    "diffusion_dpo": ([plain_dpo(5000)], LN2),
    "flow_dpo": ([plain_dpo(500)], LN2),
    "dpo": ([plain_dpo(0.1)], LN2),
    "mdpo": ([plain_dpo(0.1), ("copo", {"beta": 0.1}), ("anchor", {"beta": 0.1, "delta": 0.0})], 3 * LN2),
    "mapo": ([("mapo", {"margin_weight": 0.1, "temperature": 1000, "snr": 0.5})], None),
    "mapo_paper": ([("mapo_paper", {"beta": 8})], None),
    "sft": ([("sft", {})], None),
    "nll": ([("nll", {})], None),
}


def settings(root: Path, preset: str) -> dict[str, Any]:
    return yaml.safe_load((root / "configs" / "presets" / f"{preset}.yaml").read_text())


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_pins_its_terms(root: Path, preset: str):
    """Defaults of the losses included."""
    options = settings(root, preset)
    assert options.pop("name") == "preference"
    method = Preference(**options)
    terms, golden = PRESETS[preset]
    assert [(term.name, term.function.keywords) for term in method.terms] == terms  # type: ignore[attr-defined]
    assert all(term.weight == 1 for term in method.terms)
    assert method.golden_loss == (golden if golden is None else pytest.approx(golden, rel=1e-12))
    assert method.guidance_scale == 1


def test_every_preference_preset_is_pinned_here(root: Path):
    names = [path.stem for path in (root / "configs" / "presets").glob("*.yaml")]
    assert {name for name in names if settings(root, name)["name"] == "preference"} == set(PRESETS)


def batch_of(size: int) -> Batch:
    nothing = [None] * size
    return Batch(
        [Row("", "")] * size, nothing, nothing, nothing, nothing, [()] * size, torch.ones(size), [(0, 0)] * size
    )


CHOSEN_B = torch.tensor([3.0, -2.0, 1.0])
REJECTED_B = torch.tensor([1.0, 1.0, 1.0])
NEGATIVE_B = torch.tensor([5.0, -4.0, 1.0])
RATIO_R = torch.cat([CHOSEN_B, REJECTED_B, NEGATIVE_B])


def test_accuracies_and_margins_of_known_ratios():
    """Right, wrong and tied: 1, 0 and ½. The image's accuracy compares the chosen answer under its two images."""
    method = Preference(losses=[{"name": "dpo", "beta": 0.1}, {"name": "copo", "beta": 0.1}])
    reference_R = torch.linspace(-30, -20, 9)
    score_R = reference_R + RATIO_R
    score = Score(score_R, score_R[:, None], "exact", torch.arange(4, 13))
    metrics = method.loss(batch_of(3), score, reference_R).metrics
    assert metrics["implicit_accuracy"].tolist() == [1, 0, 0.5]
    assert metrics["image_accuracy"].tolist() == [0, 1, 0.5]
    expected = {
        "margin": CHOSEN_B - REJECTED_B,
        "image_margin": CHOSEN_B - NEGATIVE_B,
        "chosen_logp": score_R[:3],
        "rejected_logp": score_R[3:6],
        "chosen_logp_delta": CHOSEN_B,
        "rejected_logp_delta": REJECTED_B,
        "negative_logp_delta": NEGATIVE_B,
        "chosen_length": torch.tensor([4.0, 5.0, 6.0]),
    }
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, rtol=0, atol=1e-5)


def test_denoising_scores_are_logged_as_errors():
    """L = −2s; without a reference the accuracy is that of the scores themselves."""
    score_R = torch.tensor([-0.10, -0.30, -0.20, -0.20])
    score = Score(score_R, score_R[:, None], "surrogate", None)
    metrics = Preference(losses=[{"name": "mapo"}]).loss(batch_of(2), score, None).metrics
    torch.testing.assert_close(metrics["chosen_error"], torch.tensor([0.2, 0.6]))
    torch.testing.assert_close(metrics["rejected_error"], torch.tensor([0.4, 0.4]))
    assert metrics["implicit_accuracy"].tolist() == [1, 0]
    reference_R = torch.tensor([-0.15, -0.15, -0.2, -0.2])
    metrics = Preference(losses=[{"name": "dpo", "beta": 5000}]).loss(batch_of(2), score, reference_R).metrics
    torch.testing.assert_close(metrics["chosen_error_delta"], torch.tensor([-0.1, 0.3]))


def test_terms_add_up_by_weight():
    method = Preference(
        losses=[
            {"name": "dpo", "beta": 0.1},
            {"name": "copo", "beta": 0.2, "weight": 2},
            {"name": "anchor", "beta": 0.3, "delta": 0.5, "weight": 0.25},
        ]
    )
    score = Score(RATIO_R, RATIO_R[:, None], "exact", torch.ones(9))
    part = method.loss(batch_of(3), score, torch.zeros(9))
    terms = {
        "dpo": dpo(CHOSEN_B, REJECTED_B, beta=0.1),
        "copo": copo(CHOSEN_B, NEGATIVE_B, beta=0.2),
        "anchor": anchor(CHOSEN_B, beta=0.3, delta=0.5),
    }
    torch.testing.assert_close(part.loss_B, terms["dpo"] + 2 * terms["copo"] + 0.25 * terms["anchor"])
    for name, value in terms.items():
        torch.testing.assert_close(part.metrics[f"loss_{name}"], value)
    assert method.golden_loss == pytest.approx(LN2 + 2 * LN2 + 0.25 * math.log1p(math.exp(0.5)))
