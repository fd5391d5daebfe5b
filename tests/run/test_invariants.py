"""What must not change the gradient: accumulation, batching, caching, chunking, process count. On gradients, not weights
after Adam, which would hide a scale and amplify rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign import registry
from mmalign.config import ConfigError, load_config
from mmalign.data.batches import Batches, Order
from mmalign.data.cache import FeatureCache, build_cache
from mmalign.data.features import ImageFeatures
from mmalign.data.load import load_rows
from mmalign.policies.load import load_policy
from mmalign.run.preflight import PreflightError, probe
from mmalign.run.reference import ReferenceCache, score_reference
from mmalign.run.tracking import Meter
from mmalign.trainers.offline import losses

Gradients = dict[str, torch.Tensor]


class Bench:
    """One config, taken apart: policy, method, batches, and the gradients of its first step."""

    def __init__(
        self,
        config: dict[str, Any],
        *,
        cache: Path | None,
        rank: int = 0,
        world_size: int = 1,
        float64: bool = False,
    ) -> None:
        self.config = load_config(config).config
        data, train = self.config.data, self.config.train
        self.policy = load_policy(self.config.model, data=data, device="cpu", seed=train.seed)
        if float64:
            for module in (*self.policy.modules().values(), self.policy.views.reference()):
                module.double()
        self.method = registry.resolve("method", self.config.method.name)(**self.config.method.options())
        rows = load_rows(data, seed=train.seed).rows
        store = FeatureCache(cache) if cache else None
        if store is not None:
            build_cache(self.policy, rows, data, store, seed=train.seed)
        features = ImageFeatures(self.policy, data, store, seed=train.seed)
        self.batches = Batches(
            rows,
            features,
            data,
            seed=train.seed,
            batch_size=train.batch_size,
            accumulate=train.accumulate,
            num_draws=train.num_draws,
            rank=rank,
            world_size=world_size,
        )

    def nudge(self) -> None:
        """Away from step 0, where a reference-based loss has symmetric gradients that could hide a fault."""
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for _, parameter in self.policy.trainable():
                parameter.add_(3e-3 * torch.randn(parameter.shape, generator=generator))

    def gradients(self, chunk: int | None = None, step: int = 1) -> Gradients:
        train = self.config.train
        for micro in range(train.accumulate):
            batch = self.batches.make(self.batches.visits(step, micro))
            for loss, _ in losses(self.policy, self.method, batch, None, chunk, Meter({}, {}), train):
                (loss() / train.accumulate).backward()
        found = {name: parameter.grad.clone() for name, parameter in self.policy.trainable()}
        for _, parameter in self.policy.trainable():
            parameter.grad = None
        return found


def assert_same(first: Gradients, second: Gradients, tolerance: float = 1e-5) -> None:
    """Relative to the largest gradient of all: single entries near zero carry only rounding."""
    scale = max(float(gradient.abs().max()) for gradient in first.values())
    assert scale > 0
    worst = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert worst <= tolerance * scale, f"largest difference {worst:.2e}, largest gradient {scale:.2e}"


@dataclass(frozen=True)
class Setting:
    """β and temperature multiply the rounding of a score: the published ones are tested where there is next to none."""

    beta: float
    temperature: float
    float64: bool
    tolerance: float

    @property
    def method(self) -> dict[str, Any]:
        losses = [
            {"name": "dpo", "beta": self.beta},
            {"name": "mapo", "temperature": self.temperature},
            {"name": "sft", "weight": 3},
        ]
        return {"name": "preference", "losses": losses}


MODERATE = Setting(beta=100, temperature=100, float64=False, tolerance=1e-5)
PUBLISHED = Setting(beta=5000, temperature=1000, float64=True, tolerance=1e-10)
precisions = pytest.mark.parametrize(
    "setting", [MODERATE, PUBLISHED], ids=["moderate-fp32", "published-fp64"], indirect=True
)


@pytest.fixture
def setting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Setting:
    found = getattr(request, "param", MODERATE)
    if found.float64:  # each cast to fp32 on the way from the images to the gradients becomes one to float64
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return found


@pytest.fixture
def bench(tiny: Callable, tmp_path: Path, setting: Setting) -> Callable[..., Bench]:
    def make(*, cached: bool = True, rank: int = 0, world_size: int = 1, **sections: Any) -> Bench:
        config = tiny(**sections)
        config["method"] = setting.method
        cache = tmp_path / "cache" if cached else None
        found = Bench(config, cache=cache, rank=rank, world_size=world_size, float64=setting.float64)
        found.nudge()
        return found

    return make


@precisions
@pytest.mark.parametrize("model", [{}, {"lora": {"rank": 4, "targets": "all"}}], ids=["full", "lora"])
def test_accumulate_4_of_2_equals_batch_8(bench, setting, model):
    whole = bench(model=model, train={"batch_size": 8}).gradients()
    parts = bench(model=model, train={"batch_size": 2, "accumulate": 4}).gradients()
    assert_same(whole, parts, setting.tolerance)


@precisions
def test_batch_8_equals_8_single_rows(bench, setting):
    whole = bench(train={"batch_size": 8}).gradients()
    assert_same(whole, bench(train={"batch_size": 1, "accumulate": 8}).gradients(), setting.tolerance)


@precisions
def test_two_processes_see_what_one_sees(bench, setting):
    whole = bench(train={"batch_size": 8}).gradients()
    ranks = [bench(train={"batch_size": 4}, rank=rank, world_size=2).gradients() for rank in range(2)]
    assert_same(whole, {name: (ranks[0][name] + ranks[1][name]) / 2 for name in whole}, setting.tolerance)


@precisions
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("num_draws", [1, 2])
def test_score_then_backward_equals_the_joint_pass(bench, setting, chunk, num_draws):
    subject = bench(train={"batch_size": 4, "num_draws": num_draws})
    # Each score is rounded at another batch shape, and the loss multiplies that rounding by its slope.
    assert_same(subject.gradients(), subject.gradients(chunk=chunk), 10 * setting.tolerance)


@precisions
def test_cached_equals_uncached_with_random_crops_and_flips(bench, setting):
    data = {"resolution": 32, "crop": "random", "num_crops": 2, "flip": True, "prompt_dropout": 0.3}
    cached = bench(data=data, train={"batch_size": 8}).gradients()
    uncached = bench(cached=False, data=data, train={"batch_size": 8}).gradients()
    assert_same(cached, uncached, setting.tolerance)


def test_workers_change_nothing(bench):
    alone, threaded = bench(), bench(data={"num_workers": 3})
    for first, second in zip(alone.batches.iterate(0, 5), threaded.batches.iterate(0, 5), strict=True):
        assert [row.id for row in first.rows] == [row.id for row in second.rows]
        assert all(torch.equal(a["mean"], b["mean"]) for a, b in zip(first.chosen, second.chosen, strict=True))


# --- order and draws --------------------------------------------------------------------------------------------------


def test_each_epoch_visits_every_row_once_in_a_new_order():
    order = Order(num_rows=10, seed=0)
    epochs = [[order.row(position) for position in range(e * 10, e * 10 + 10)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert sorted(row for row, _ in epoch) == list(range(10))
        assert {visit for _, visit in epoch} == {number}
    assert epochs[0] != epochs[1]
    assert [Order(10, 0).row(p) for p in range(30)] == [place for epoch in epochs for place in epoch]
    assert [Order(10, 1).row(p) for p in range(10)] != epochs[0]


def test_draws_are_new_at_each_visit_and_cycle_with_a_cached_reference(bench):
    fresh = bench(train={"num_draws": 2})
    assert [fresh.batches.make([(3, visit)]).keys[0][0].draw for visit in range(4)] == [0, 2, 4, 6]
    cycled = bench(train={"num_draws": 2}, data={"cache_reference": 4})
    made = [cycled.batches.make([(3, visit)]) for visit in range(4)]
    assert [[key.draw for key in batch.keys[0]] for batch in made] == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert [batch.slot_B[0] for batch in made] == [(3, 0), (3, 1), (3, 0), (3, 1)]


def test_cached_draws_must_fit_the_draws_of_a_visit(bench):
    with pytest.raises(ValueError, match=r"cache_reference = 3: must be a multiple of train\.num_draws = 2"):
        bench(train={"num_draws": 2}, data={"cache_reference": 3})


def test_flip_crop_and_prompt_are_shared_by_a_pair(bench):
    subject = bench(data={"flip": True, "crop": "random", "num_crops": 3, "resolution": 32, "prompt_dropout": 0.5})
    flipped = dropped = 0
    empty = subject.batches.features.prompt("")["embeds"]
    for visit in range(12):
        batch = subject.batches.make([(0, visit)])
        assert torch.equal(batch.chosen[0]["size"], batch.rejected[0]["size"])
        dropped += int(torch.equal(batch.context[0]["embeds"], empty))
        flipped += int(subject.batches.features._flip(batch.rows[0], visit))
    assert 0 < flipped < 12
    assert 0 < dropped < 12


# --- golden numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model", [{}, {"lora": {"rank": 4}}, {"dtype": "bf16"}, {"lora": {"rank": 4}, "dtype": "bf16"}]
)
@pytest.mark.parametrize("method", [{"preset": "diffusion_dpo"}, {"preset": "mapo"}])
def test_golden_numbers_at_step_0(tiny, tmp_path, model, method):
    subject = Bench(tiny(model=model, method=method, train={"batch_size": 4}), cache=tmp_path / "cache")
    batch = subject.batches.make(subject.batches.visits(0, 0))
    reference_R = score_reference(subject.policy, subject.method, batch) if subject.method.needs_reference else None
    found = probe(subject.policy, subject.method, batch, reference_R, dtype=subject.config.model.dtype, cached=False)
    assert all(parameter.grad is None for _, parameter in subject.policy.trainable())
    if method["preset"] == "diffusion_dpo":
        assert found.loss == pytest.approx(0.6931471805599453, rel=1e-6)
        assert found.implicit_accuracy == 0.5
        assert found.score_gradient == pytest.approx(2500, rel=1e-6)
    else:
        assert found.golden is None
    # Only LoRA's A factors may start without a gradient, because B = 0.
    assert list(found.zero_gradients) == [name for name, _ in subject.policy.trainable() if ".lora_A." in name]


UNUSED = "transformer_blocks.5.attn.add_q_proj"  # SD3's last block drops the text stream after its attention
UNUSED_SAID = "with zero gradient on this batch (unused by the model, or too small for the dtype), e.g. ["
FACTORS = "LoRA A factors have zero gradient while B = 0"


@pytest.mark.parametrize(
    ("family", "lora", "says"),
    [
        ("sdxl", None, "gradients reach 212 of 212 trained tensors"),
        ("sdxl", {"rank": 4}, f"gradients reach 32 of 64 trained tensors; 32 {FACTORS}"),
        (
            "sd3",
            None,
            f"gradients reach 199 of 202 trained tensors; 3 {UNUSED_SAID}'{UNUSED}.weight', '{UNUSED}.bias', ",
        ),
        ("sd3", {"targets": "all"}, f"of 174 trained tensors; 87 {FACTORS}; 1 {UNUSED_SAID}'{UNUSED}.lora_B."),
    ],
)
def test_zero_gradients_are_explained_by_what_is_trained(tiny, tmp_path, family, lora, says):
    model = {"family": family, "path": f"builtin:{family}-tiny", "lora": lora}
    preset = "flow_dpo" if family == "sd3" else "diffusion_dpo"
    subject = Bench(tiny(model=model, method={"preset": preset}), cache=tmp_path / "cache")
    batch = subject.batches.make(subject.batches.visits(0, 0))
    reference_R = score_reference(subject.policy, subject.method, batch)
    found = probe(subject.policy, subject.method, batch, reference_R, dtype="fp32", cached=False)
    assert says in found.lines()[-1]
    assert ("LoRA" in found.lines()[-1]) == (lora is not None)


@pytest.mark.parametrize("model", [{}, {"lora": {"rank": 4}}])
def test_cached_reference_stays_within_its_bound_and_matches_fresh_scores(tiny, tmp_path, model):
    config = tiny(model=model, data={"cache_reference": 2}, train={"batch_size": 4})
    subject = Bench(config, cache=tmp_path / "cache")

    def make() -> ReferenceCache:
        path = tmp_path / "reference.safetensors"
        return ReferenceCache(path, "f", num_rows=24, num_visits=2, requests_per_row=2)

    table = make()
    built = table.build(subject.policy, subject.method, subject.batches, batch_size=7, progress=lambda *_: None)
    assert built == 48
    table.save()
    batch = subject.batches.make(subject.batches.visits(0, 0))
    found = probe(subject.policy, subject.method, batch, table.get(batch), dtype="fp32", cached=True)
    assert abs(found.loss - found.golden) <= found.tolerance < 0.05
    fresh = score_reference(subject.policy, subject.method, batch)
    torch.testing.assert_close(table.get(batch), fresh, rtol=1e-5, atol=0)
    again = make()
    assert again.build(subject.policy, subject.method, subject.batches, batch_size=7, progress=lambda *_: None) == 0
    assert torch.equal(again.table, table.table)


def test_preflight_catches_a_reference_of_other_weights(tiny, tmp_path):
    subject = Bench(tiny(train={"batch_size": 4}), cache=tmp_path / "cache")
    batch = subject.batches.make(subject.batches.visits(0, 0))
    stale_R = score_reference(subject.policy, subject.method, batch)
    stale_R = stale_R + 1e-3 * torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1])
    with pytest.raises(PreflightError, match=r"step-0 loss is .* expected 0\.69314718"):
        probe(subject.policy, subject.method, batch, stale_R, dtype="fp32", cached=True)


def test_a_loss_for_exact_likelihoods_is_refused_on_diffusion_scores(tiny, tmp_path):
    loss = tmp_path / "my_loss.py"
    loss.write_text("def nats(chosen_ratio_B):\n    return -chosen_ratio_B\n\nnats.accepts = ('exact',)\n")
    config = tiny(train={"batch_size": 2})
    config["method"] = {"name": "preference", "losses": [{"name": f"{loss}:nats"}]}
    with pytest.raises(ConfigError, match="'sdxl' gives surrogate scores"):
        load_config(config)
