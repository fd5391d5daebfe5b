"""One core, three modalities: every loss function, run as it is on a diffusion, a flow and a language-model policy.

A loss that is not defined for a policy's scores must be refused by the config; every other pair must show the declared
step-0 value, an unreduced `[B]`, the analytic gradient in the trained weights, and a margin that rises.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmalign import registry
from mmalign.config import ConfigError, load_config
from mmalign.data.batches import Batches
from mmalign.data.features import make_features
from mmalign.data.load import load_rows
from mmalign.losses.policy_gradient import clipped_surrogate
from mmalign.policies.load import load_policy
from mmalign.run.reference import score_reference
from mmalign.types import DrawKey

POLICIES = {
    "sdxl": {
        "model": {"family": "sdxl", "path": "builtin:sdxl-tiny"},
        "data": {"path": "builtin:synthetic", "format": "synthetic", "options": {"num_pairs": 8}},
    },
    "sd3": {
        "model": {"family": "sd3", "path": "builtin:sd3-tiny", "max_sequence_length": 8},
        "data": {"path": "builtin:synthetic", "format": "synthetic", "options": {"num_pairs": 8}},
    },
    "llava": {
        "model": {"family": "llava", "path": "builtin:llava-tiny"},
        "data": {"path": "builtin:synthetic_answers", "format": "synthetic_answers", "options": {"num_pairs": 8}},
    },
}
# Moderate settings: β multiplies the rounding of scores, and a numeric gradient should see the loss, not that.
SETTINGS = {
    "surrogate": {
        "dpo": {"beta": 100},
        "anchor": {"beta": 100},
        "mapo": {"temperature": 100},
        "mapo_paper": {},
        "sft": {},
    },
    "exact": {"dpo": {"beta": 0.5}, "copo": {"beta": 0.5}, "anchor": {"beta": 0.5}, "nll": {}},
}
KIND = {"sdxl": "surrogate", "sd3": "surrogate", "llava": "exact"}
RISES = {"copo": "image_margin", "sft": "chosen_error", "nll": "chosen_logp", "anchor": "chosen"}
LEARNING_RATE = {"sdxl": 3e-4, "sd3": 3e-4, "llava": 3e-3}


def config_of(family: str, loss: str, **settings: Any) -> dict[str, Any]:
    return {
        "model": {**POLICIES[family]["model"], "lora": {"rank": 4, "targets": "all"}},
        "method": {"name": "preference", "losses": [{"name": loss, **settings}]},
        "data": {**POLICIES[family]["data"], "cache": False},
        "train": {"steps": 1, "batch_size": 4, "learning_rate": 1e-4},
        "output_dir": "unused",
    }


def test_every_registered_loss_is_in_this_test():
    assert set(registry.names("loss")) == {name for kind in SETTINGS.values() for name in kind}


def settings_for(loss: str) -> dict[str, Any]:
    return next(kind[loss] for kind in SETTINGS.values() if loss in kind)


@pytest.mark.slow
@pytest.mark.parametrize("family", POLICIES)
@pytest.mark.parametrize("loss", registry.names("loss"))
def test_loss_on_policy(loss: str, family: str):
    if loss not in SETTINGS[KIND[family]]:
        with pytest.raises(ConfigError, match="defined for"):
            load_config(config_of(family, loss, **settings_for(loss)))
        return
    config = load_config(config_of(family, loss, **SETTINGS[KIND[family]][loss])).config
    policy = load_policy(config.model, data=config.data, device="cpu", seed=0)
    method = registry.resolve("method", "preference")(**config.method.options())
    rows = load_rows(config.data, seed=0).rows
    features = make_features(policy, config.data, None, seed=0, rows=rows, negatives=method.needs_negative)
    batches = Batches(rows, features, config.data, seed=0, batch_size=4, accumulate=1, negatives=method.needs_negative)
    batch = batches.make(batches.visits(0, 0))
    reference_R = score_reference(policy, method, batch) if method.needs_reference else None
    parameters = [parameter for _, parameter in policy.trainable()]

    def part() -> Any:
        return method.loss(batch, policy.score(method.requests(batch)), reference_R)

    first = part()
    assert first.loss_B.shape == (4,)
    assert first.loss_B.requires_grad
    golden = method.golden_loss
    if golden is not None:
        assert float(first.loss_B.detach().mean()) == pytest.approx(golden, rel=1e-6)
        if "implicit_accuracy" in first.metrics:
            assert float(first.metrics["implicit_accuracy"].mean()) == 0.5

    nudge(parameters)
    check_gradient(lambda: part().loss_B.mean(), parameters)

    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE[family], weight_decay=0.0)
    before = watched(loss, part())
    for _ in range(6):
        part().loss_B.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = watched(loss, part())
    assert after > before, (before, after)


def watched(loss: str, part: Any) -> float:
    """What the loss is to raise: the margin of the pair, of the images, or the winner's score."""
    metrics = part.metrics
    name = RISES.get(loss, "margin")
    if name == "chosen":
        name = "chosen_logp" if "chosen_logp" in metrics else "chosen_error"
    sign = -1 if name.endswith("error") else 1
    return sign * float(metrics[name].mean())


def nudge(parameters: list[torch.nn.Parameter]) -> None:
    """Away from step 0, where B = 0 hides half of the adapter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def check_gradient(loss: Any, parameters: list[torch.nn.Parameter]) -> None:
    """The slope of the loss along its own gradient, analytic against a central difference."""
    gradients = torch.autograd.grad(loss(), parameters)
    norm = torch.stack([g.double().norm() for g in gradients]).norm()
    size = 3e-2 / float(norm) if float(norm) > 1 else 3e-2
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(sign * size * gradient / norm)
            values.append(float(loss().double()))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.add_(size * gradient / norm)
    numeric = (values[0] - values[1]) / (2 * size)
    assert numeric == pytest.approx(float(norm), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("family", POLICIES)
def test_clipped_surrogate_on_policy(family: str):
    """Denoising steps `[B, S]`, or whole responses `[B, 1]`: ratio 1 and loss −A at first, then log π follows A."""
    config = load_config(config_of(family, "dpo", beta=1.0)).config
    policy = load_policy(config.model, data=config.data, device="cpu", seed=0)
    parameters = [parameter for _, parameter in policy.trainable()]
    if KIND[family] == "surrogate":
        kernel = {"kernel": "ddim", "level": 1.0} if family == "sdxl" else {"kernel": "flow_sde", "level": 0.7}
        keys = [DrawKey(0, "row", n) for n in range(4)]
        trajectory = policy.rollout(
            policy.encode_prompts(["a large red circle on a white background"] * 4),
            keys=keys,
            first_keys=keys,
            steps=policy.rollout_steps(**kernel, num_steps=5),
            index_BS=torch.tensor([[0, 2]] * 4),
            guidance_scale=1.0,
        )
        replay = policy.replayer(trajectory)

        def log_prob() -> torch.Tensor:
            return torch.stack([replay(column).log_prob_B for column in (0, 1)], dim=1)

        clip_range, old_BS = 1e-3, trajectory.log_prob_BS
    else:
        method = registry.resolve("method", "preference")(**config.method.options())
        rows = load_rows(config.data, seed=0).rows
        batches = Batches(
            rows, make_features(policy, config.data, None, seed=0, rows=rows), config.data,
            seed=0, batch_size=2, accumulate=1,
        )  # fmt: skip
        batch = batches.make(batches.visits(0, 0))

        def log_prob() -> torch.Tensor:
            return policy.score(method.requests(batch)).value_R[:, None]

        clip_range, old_BS = 0.2, log_prob().detach()
    advantage_B = torch.tensor([1.0, -1.0, 0.5, -0.5])
    loss_BS = clipped_surrogate(log_prob(), old_BS, advantage_B, clip_range=clip_range)
    assert loss_BS.shape == old_BS.shape
    assert torch.allclose(loss_BS, -advantage_B[:, None].expand_as(loss_BS), atol=1e-5)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    for _ in range(3):
        clipped_surrogate(log_prob(), old_BS, advantage_B, clip_range=clip_range).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gained_B = (log_prob() - old_BS).mean(1)
    assert float((gained_B * advantage_B).detach().sum()) > 0

    nudge(parameters)
    old_BS = log_prob().detach()  # ratio 1 again, wide bounds: the slope is that of −A log π
    check_gradient(lambda: clipped_surrogate(log_prob(), old_BS, advantage_B, clip_range=0.9).mean(), parameters)
