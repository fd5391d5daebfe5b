"""A base model that goes away while it is fully fine-tuned: the weights are kept, and the evidence is made up for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from mmalign.builtin import builtin_path

FAMILY = """
from pathlib import Path

from mmalign.policies.families.sdxl import StableDiffusionXL

FAULT = Path(__file__).with_name("fault")


class Leaving(StableDiffusionXL):
    def export(self, folder):
        super().export(folder)
        if not FAULT.exists():
            return
        base = Path(self.config.path)
        if FAULT.read_text() == "gone":
            base.rename(FAULT.with_name("away"))
        else:
            weights = base / "unet" / "diffusion_pytorch_model.safetensors"
            start = weights.read_bytes()[:1000]
            weights.unlink()  # what is mapped into memory stays
            weights.write_bytes(start)
        FAULT.unlink()
"""


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("gone", "it is not on this disk"), ("damaged", "Unable to load weights from checkpoint file")],
)
def test_base_that_goes_before_the_evaluation(
    tiny: Callable, command: Callable, tmp_path: Path, fault: str, reason: str
):
    """Nothing but the evaluation needs a reference here, so it is loaded when the training is over."""
    model, run, config = tmp_path / "model", tmp_path / "run", tmp_path / "config.yaml"
    shutil.copytree(builtin_path("builtin:sdxl-tiny"), model)
    (tmp_path / "family.py").write_text(FAMILY)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    evaluate = {"prompts": str(tmp_path / "prompts.txt"), "seeds": 1, "num_steps": 2, "rewards": ["aesthetic"]}
    family = {"family": f"{tmp_path / 'family.py'}:Leaving", "path": str(model)}
    config.write_text(yaml.safe_dump(tiny(model=family, method={"preset": "sft"}, evaluate=evaluate)))
    (tmp_path / "fault").write_text(fault)

    code, _, err = command("train", config)
    line = next(line for line in err.splitlines() if line.startswith("error: "))
    assert code == 2
    assert line.startswith(f"error: cannot load '{model}': ")
    for part in (
        reason,
        "Full fine-tuning loads the base again, as the reference it is compared with: put it back as it was. ",
        f"weights are safe in {run / 'final'}; only the evaluation is missing",
        f"start the same command again, or compare with `mmalign grid {run}`",
    ):
        assert part in line
    weights = run / "final" / "unet" / "diffusion_pytorch_model.safetensors"
    trained = load_file(weights)
    assert not [name for name in ("report.json", "summary.json") if (run / name).exists()]
    metrics = (run / "metrics.jsonl").read_bytes()
    assert command("train", config)[0] == 2  # still away: nothing is lost by trying

    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(builtin_path("builtin:sdxl-tiny"), model)
    code, _, err = command("grid", run, "--out", tmp_path / "grid")
    assert code == 0, err
    code, out, err = command("train", config)
    assert code == 0, err
    assert "resumed from" in out
    assert (run / "report.json").is_file()
    assert (tmp_path / "grid" / "report.json").is_file()
    assert (run / "metrics.jsonl").read_bytes() == metrics
    again = load_file(weights)
    assert all(tensor.equal(again[name]) for name, tensor in trained.items())
    assert "finished at step 2" in command("train", config)[1]
