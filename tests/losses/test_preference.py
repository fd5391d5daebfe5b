"""Closed forms, golden numbers, gradients, symmetries and extremes of the preference losses.

Shape legend: B rows.
"""

from __future__ import annotations

import math

import pytest
import torch

from mmalign.losses.preference import anchor, bose, copo, dpo, mapo, mapo_paper, nll, sft

LN2 = math.log(2)


def scores(num: int = 64, scale: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return -scale * torch.rand(num, generator=generator), -scale * torch.rand(num, generator=generator)


# --- dpo --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1}, {"label_smoothing": 0.2, "robust": True}])
def test_dpo_is_ln2_at_zero_ratio(settings: dict):
    zero_B = torch.zeros(5)
    loss_B = dpo(zero_B, zero_B, beta=5000, **settings)
    assert loss_B.shape == (5,)
    torch.testing.assert_close(loss_B, torch.full((5,), LN2), rtol=1e-6, atol=0)
    assert dpo.golden == LN2


def test_dpo_equals_the_published_form_on_errors():
    """Released code: -logsigmoid(-beta/2 * ((L_w - L_l) - (L_w_ref - L_l_ref))) with L the mean squared error."""
    torch.manual_seed(0)
    error_w, error_l, ref_w, ref_l = torch.rand(4, 16, dtype=torch.float64) * 1e-3 + 0.1
    published = -torch.nn.functional.logsigmoid(-0.5 * 5000 * ((error_w - error_l) - (ref_w - ref_l)))
    ours = dpo(-0.5 * error_w + 0.5 * ref_w, -0.5 * error_l + 0.5 * ref_l, beta=5000)
    torch.testing.assert_close(ours.double(), published, rtol=1e-5, atol=1e-6)


def test_dpo_gradients_at_step_0_are_half_beta_in_score_and_quarter_beta_in_error():
    score_w, score_l = (torch.tensor([-0.1], requires_grad=True) for _ in range(2))
    dpo(score_w + 0.1, score_l + 0.1, beta=5000).sum().backward()
    assert score_w.grad.item() == pytest.approx(-2500, rel=1e-6)
    assert score_l.grad.item() == pytest.approx(2500, rel=1e-6)
    error_w, error_l = (torch.tensor([0.2], requires_grad=True) for _ in range(2))
    dpo(-0.5 * error_w + 0.1, -0.5 * error_l + 0.1, beta=5000).sum().backward()
    assert error_w.grad.item() == pytest.approx(1250, rel=1e-6)
    assert error_l.grad.item() == pytest.approx(-1250, rel=1e-6)


def test_dpo_swapping_the_pair_negates_the_logit():
    ratio_w, ratio_l = torch.tensor([0.003]), torch.tensor([-0.001])
    h = 5000 * 0.004
    assert dpo(ratio_w, ratio_l, beta=5000).item() == pytest.approx(math.log1p(math.exp(-h)), rel=1e-3, abs=1e-12)
    # -log sigma(-h) = h - log sigma(h): the two orders differ by the logit itself.
    difference = dpo(ratio_l, ratio_w, beta=5000) - dpo(ratio_w, ratio_l, beta=5000)
    assert difference.item() == pytest.approx(h, rel=1e-6)


def test_cdpo_and_robust_by_hand():
    h, epsilon = 1.2, 0.1
    right, wrong = math.log1p(math.exp(-h)), math.log1p(math.exp(h))
    arguments = (torch.tensor([h / 2]), torch.tensor([-h / 2]))
    conservative = dpo(*arguments, beta=1.0, label_smoothing=epsilon).item()
    robust = dpo(*arguments, beta=1.0, label_smoothing=epsilon, robust=True).item()
    assert conservative == pytest.approx((1 - epsilon) * right + epsilon * wrong, rel=1e-6)
    assert robust == pytest.approx(((1 - epsilon) * right - epsilon * wrong) / (1 - 2 * epsilon), rel=1e-6)


def test_soft_tie_is_symmetric_and_preference_one_changes_nothing():
    ratio_w, ratio_l = scores()
    tie_B = torch.full_like(ratio_w, 0.5)
    torch.testing.assert_close(dpo(ratio_w, ratio_l, tie_B, beta=10), dpo(ratio_l, ratio_w, tie_B, beta=10))
    assert torch.equal(dpo(ratio_w, ratio_l, torch.ones_like(tie_B), beta=10), dpo(ratio_w, ratio_l, beta=10))


def test_robust_is_unbiased_under_label_flips():
    """E over flips with probability eps of the robust loss = the clean loss."""
    ratio_w, ratio_l = scores()
    clean = dpo(ratio_w, ratio_l, beta=10)
    keep, flip = (
        dpo(*pair, beta=10, label_smoothing=0.2, robust=True) for pair in ((ratio_w, ratio_l), (ratio_l, ratio_w))
    )
    torch.testing.assert_close(0.8 * keep + 0.2 * flip, clean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{"beta": 0}, {"beta": -1}, {"beta": 1, "label_smoothing": 0.5}])
def test_dpo_names_settings_out_of_range(settings: dict):
    with pytest.raises(ValueError, match=r"beta = |label_smoothing = "):
        dpo(torch.zeros(1), torch.zeros(1), **settings)


# --- mapo -------------------------------------------------------------------------------------------------------------


def mapo_float64(error_w: torch.Tensor, error_l: torch.Tensor, form: str, beta: float) -> torch.Tensor:
    """The formulas in float64 with math.expm1, one number at a time."""

    def phi(x: float) -> float:
        return 1.0 if x == 0 else x / math.expm1(x)

    values = []
    for winner, loser in zip(error_w.double().tolist(), error_l.double().tolist(), strict=True):
        if form == "released":
            logit, scale = 1000 * (phi(0.5 * winner) - phi(0.5 * loser)), 0.1
        else:
            logit, scale = phi(winner) ** beta - phi(loser) ** beta, 1 / beta
        values.append(winner + scale * math.log1p(math.exp(-logit)))
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("beta", [8.0, 1024.0])
@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-3, 1e-2, 0.3])
def test_mapo_equals_float64(form: str, beta: float, scale: float):
    score_w, score_l = scores(scale=scale / 2)
    expected = mapo_float64(-2 * score_w, -2 * score_l, form, beta)
    ours = mapo(score_w, score_l) if form == "released" else mapo_paper(score_w, score_l, beta=beta)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", [mapo, mapo_paper])
def test_mapo_is_finite_at_zero_error_with_finite_gradients(loss):
    score_w, score_l = (torch.tensor([0.0, -1e-9, 0.0], requires_grad=True) for _ in range(2))
    loss_B = loss(score_w, score_l)
    loss_B.sum().backward()
    assert torch.isfinite(loss_B).all()
    for gradient in (score_w.grad, score_l.grad):
        assert torch.isfinite(gradient).all()
        assert (gradient != 0).all()


def test_mapo_slopes_at_zero_margin_as_derived():
    """Released: d logit / d L_w = -T s / 2 = -250, so the margin term pushes 0.1 * 1/2 * 250 = 12.5 times the SFT term."""
    error_w = torch.tensor([1e-5], requires_grad=True)
    mapo(-0.5 * error_w, torch.tensor([-0.5e-5])).sum().backward()
    assert error_w.grad.item() == pytest.approx(1 + 12.5, rel=1e-3)
    error_w = torch.tensor([1e-5], requires_grad=True)
    mapo_paper(-0.5 * error_w, torch.tensor([-0.5e-5]), beta=8.0).sum().backward()
    assert error_w.grad.item() == pytest.approx(1 + 0.25, rel=1e-3)


@pytest.mark.parametrize("loss", [mapo, mapo_paper])
def test_mapo_falls_when_the_winner_improves_and_when_the_loser_gets_worse(loss):
    winner, loser = torch.tensor([-0.05]), torch.tensor([-0.06])
    base = loss(winner, loser)
    assert loss(winner + 0.01, loser) < base
    assert loss(winner, loser - 0.01) < base


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-7), (torch.float64, 1e-15)])
def test_bose_is_exact_across_its_series(dtype: torch.dtype, tolerance: float):
    x = torch.logspace(-8, 1.9, 400, dtype=dtype)
    exact = torch.tensor([value / math.expm1(value) for value in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(bose(x).double(), exact, rtol=tolerance, atol=0)


def test_mapo_paper_names_a_beta_out_of_range():
    with pytest.raises(ValueError, match="beta = 0"):
        mapo_paper(torch.zeros(1), torch.zeros(1), beta=0)


# --- mDPO's terms and nll ---------------------------------------------------------------------------------------------


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def test_copo_equals_float64_and_contrasts_the_images():
    """softplus(−β(ρ(m_w, y_w) − ρ(m_l, y_w)))."""
    true = torch.tensor([2.0, -3.0, 0.5, 40.0])
    negative = torch.tensor([-1.0, 4.0, 0.5, -40.0])
    expected = [softplus(-0.1 * (t - n)) for t, n in zip(true.tolist(), negative.tolist(), strict=True)]
    torch.testing.assert_close(copo(true, negative, beta=0.1), torch.tensor(expected), rtol=1e-6, atol=0)
    assert copo(true, true, beta=0.1)[0].item() == pytest.approx(LN2, rel=1e-6)
    assert copo.golden == LN2
    swapped = copo(negative, true, beta=0.1) - copo(true, negative, beta=0.1)
    torch.testing.assert_close(swapped, 0.1 * (true - negative), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("delta", [0.0, 0.7, -1.3])
def test_anchor_equals_float64_and_asks_for_delta(delta: float):
    """−log σ(β ρ_w − δ) = softplus(δ − β ρ_w): δ is the reward that the chosen response has to exceed."""
    ratio = torch.tensor([0.0, 2.0, -5.0, 60.0])
    expected = [softplus(delta - 0.1 * r) for r in ratio.tolist()]
    torch.testing.assert_close(anchor(ratio, beta=0.1, delta=delta), torch.tensor(expected), rtol=1e-6, atol=0)
    golden = anchor.golden(beta=0.1, delta=delta)
    assert golden == pytest.approx(softplus(delta), rel=1e-12)
    assert anchor(torch.zeros(1), beta=0.1, delta=delta).item() == pytest.approx(golden, rel=1e-6)
    at_delta = torch.tensor([delta / 0.1])
    assert anchor(at_delta, beta=0.1, delta=delta).item() == pytest.approx(LN2, rel=1e-6)


def test_nll_is_nats_per_token():
    score, length = torch.tensor([-6.0, -0.5, 0.0]), torch.tensor([4, 1, 7])
    torch.testing.assert_close(nll(score, length), torch.tensor([1.5, 0.5, 0.0]), rtol=1e-7, atol=0)


@pytest.mark.parametrize("loss", [copo, lambda w, n, beta: anchor(w, beta=beta)])
def test_mdpo_terms_fall_when_the_true_image_explains_more(loss):
    true, negative = torch.tensor([1.0], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    loss(true, negative, beta=0.1).sum().backward()
    assert true.grad.item() < 0
    assert negative.grad is None or negative.grad.item() == -true.grad.item()
    with pytest.raises(ValueError, match="beta = 0"):
        loss(true, negative, beta=0)


# --- properties of all ------------------------------------------------------------------------------------------------

LOSSES = [
    lambda w, l: dpo(w, l, beta=20.0),  # noqa: E741
    lambda w, l: dpo(w, l, beta=20.0, label_smoothing=0.1),  # noqa: E741
    lambda w, l: dpo(w, l, beta=20.0, label_smoothing=0.1, robust=True),  # noqa: E741
    lambda w, l: mapo(w, l),  # noqa: E741
    lambda w, l: mapo_paper(w, l),  # noqa: E741
    lambda w, l: sft(w),  # noqa: E741
    lambda w, l: copo(w, l, beta=20.0),  # noqa: E741
    lambda w, l: anchor(w, beta=20.0, delta=0.5),  # noqa: E741
    lambda w, l: nll(w, torch.full_like(w, 7)),  # noqa: E741
]


@pytest.mark.parametrize("loss", LOSSES)
def test_batched_equals_stacked_and_order_does_not_matter(loss):
    score_w, score_l = scores(7)
    together = loss(score_w, score_l)
    one_by_one = torch.cat([loss(score_w[i : i + 1], score_l[i : i + 1]) for i in range(7)])
    assert torch.equal(together, one_by_one)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    assert torch.equal(loss(score_w[order], score_l[order]), together[order])


@pytest.mark.parametrize("loss", LOSSES)
def test_numeric_equals_analytic_gradient(loss, monkeypatch: pytest.MonkeyPatch):
    """The whole Jacobian by central differences, with every cast to fp32 made one to float64: no row sees another."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    score_w, score_l = (score.double().requires_grad_(True) for score in scores(8))
    assert torch.autograd.gradcheck(loss, (score_w, score_l), eps=1e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_scores_are_lifted_to_fp32(loss):
    score_w, score_l = scores(8)
    assert loss(score_w.bfloat16(), score_l.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e6])
def test_dpo_is_finite_at_the_extremes(beta: float):
    ratio = torch.tensor([-1e3, 0.0, 1e3], requires_grad=True)
    loss_B = dpo(ratio, -ratio, beta=beta)
    loss_B.sum().backward()
    assert torch.isfinite(loss_B).all()
    assert torch.isfinite(ratio.grad).all()
