"""The benchmarks run and print finite ratios. No time is asserted: this machine may be busy."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`models` and `side_by_side`, which the scripts import from their own folder."""
    names = ("models", "side_by_side")
    monkeypatch.syspath_prepend(str(BENCH))
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import models
    import side_by_side

    yield models, side_by_side
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_all_benchmarks_run_and_give_finite_ratios(tmp_path: Path):
    """Through `run.py`; each benchmark itself checks that both sides do the same FLOPs in the network."""
    saved = BENCH / "results.json"
    before = saved.read_bytes() if saved.is_file() else None
    command = [sys.executable, str(BENCH / "run.py"), "--quick", "--save", str(tmp_path / "results.json")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    names = [line["name"] for line in found["results"]]
    with_trl = importlib.util.find_spec("trl") is not None
    assert len(names) == len(set(names)) == (9 if with_trl else 6)
    # With trl both sides computed the same losses, or `run.py` had failed.
    assert ("losses of the first 10 steps" if with_trl else "trl: not installed") in found["remarks"][0]
    for line in found["results"]:
        assert line["name"] in done.stdout
        for key in ("ratio", "low", "high", "cpu_ratio", "ours_seconds", "other_seconds"):
            assert math.isfinite(line[key]), line
            assert line[key] > 0, line
        assert line["low"] <= line["ratio"] <= line["high"]
    assert found["conditions"]["size"] == "quick"
    assert str(found["conditions"]["commit"]) in done.stdout
    assert (saved.read_bytes() if saved.is_file() else None) == before
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_flops_of_a_layer_are_two_per_multiply_add(modules: Any):
    import torch

    models, _ = modules
    layer, x_NC = torch.nn.Linear(8, 4, bias=False), torch.zeros(3, 8)
    forward = 2 * 3 * 8 * 4
    assert models.flops(lambda: layer(x_NC)) == forward
    # The input needs no gradient, so the backward pass is one product, that of the weight.
    assert models.flops(lambda: layer(x_NC).sum().backward()) == 2 * forward


def test_sdxl_configuration_has_the_published_size(modules: Any):
    """2.567 B parameters; 6.76 TFLOP for a UNet forward at 1024 px, 4.88 to encode an image, 0.11 for a prompt."""
    models, _ = modules
    unet, forward, encode, text = models.sdxl_forward_flops(1024)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_463_684
    assert [round(value / 1e12, 2) for value in (forward, encode, text)] == [6.76, 4.88, 0.11]


def test_prediction_is_the_share_of_what_is_not_encoded(modules: Any):
    models, _ = modules
    count = models.PairFlops(unet=60.0, vae=30.0, text=10.0)
    assert count.speedup == pytest.approx(100 / 60)
    assert count.shares == "60.0 : 30.0 : 10.0 %"


def test_ratios_are_medians_over_pairs(modules: Any):
    _, side_by_side = modules
    block = side_by_side.Block
    ours = [block(2.0, 4.0), block(3.0, 6.0), block(40.0, 8.0)]
    timing = side_by_side.Timing(ours, [block(2.0, 2.0)] * 3, 1, 1)
    slow = side_by_side.Result.slowdown("x", timing, at_most=1.5)
    assert (slow.ratio, slow.cpu_ratio, slow.verdict) == (1.5, 3.0, "<= 1.5 met")
    fast = side_by_side.Result.speedup("x", timing, over=2.0, at_least=0.9)
    assert fast.ratio == pytest.approx(1 / 3)
    assert fast.verdict == ">= 0.9 missed"


def test_sides_that_compute_different_things_are_refused(modules: Any):
    _, side_by_side = modules
    side_by_side.check_same_work(1000, 1001)
    with pytest.raises(RuntimeError, match="were expected"):
        side_by_side.check_same_work(1000, 1300)
