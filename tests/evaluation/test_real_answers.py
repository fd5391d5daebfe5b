"""The bundled LLaVA answers questions about the synthetic world: evidence, preview and `mmalign grid` with real weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from mmalign import load_policy
from mmalign.config import ConfigError, EvaluateConfig, LoraConfig, ModelConfig
from mmalign.evaluation import evaluate_policy
from mmalign.reward import load_reward
from mmalign.run.comparison import compare
from mmalign.run.preview import draw_preview

SETTINGS = EvaluateConfig(prompts="builtin:scenes_dev", limit=6, seeds=2, batch_size=8, max_new_tokens=30)


@pytest.fixture(scope="module")
def policy() -> Any:
    return load_policy(ModelConfig(family="llava", path="builtin:llava-tiny", lora=LoraConfig(rank=4, targets="all")))


@pytest.fixture(scope="module")
def adapter(policy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes what the model says, as `export` writes it. Leaves `policy` with it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.trainable():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("adapter")
    policy.export(folder)
    return folder


def responses(folder: Path) -> dict[str, list[str]]:
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        label: [line["response"] for line in lines if line["label"] == label]
        for label in dict.fromkeys(line["label"] for line in lines)
    }


def run_config(folder: Path) -> Path:
    config = {
        "model": {"family": "llava", "path": "builtin:llava-tiny"},
        "method": {"preset": "dpo"},
        "data": {"path": "builtin:llava-pairs"},
        "train": {"steps": 1, "batch_size": 2, "learning_rate": 1e-4},
        "evaluate": {
            "prompts": "builtin:scenes_dev",
            "limit": 6,
            "batch_size": 8,
            "max_new_tokens": 30,
            "rewards": ["synthetic_answers"],
        },
        "output_dir": str(folder / "run"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def test_an_untrained_adapter_answers_as_the_base_does(policy: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        for name, parameter in policy.trainable():
            if "lora_B" in name:
                parameter.zero_()
    report = evaluate_policy(policy, SETTINGS, [(load_reward("synthetic_answers"), False)], tmp_path)
    said = responses(tmp_path)
    assert said["before"] == said["after"]
    assert report.comparison().tie_share == 1.0
    # Seeds are different draws, and answers of the tiny world are in its language.
    assert any(first != second for first, second in zip(said["before"][::2], said["before"][1::2], strict=True))
    assert all(text.startswith("there is a") for text in said["before"])
    assert json.loads((tmp_path / "report.json").read_text())["rewards"]["synthetic_answers.grounded"]["n_prompts"] == 6


def test_grid_compares_a_base_with_an_adapter_folder(policy: Any, adapter: Path, tmp_path: Path) -> None:
    evaluate_policy(policy, SETTINGS, [], tmp_path / "direct", labels=("base", "tuned"))
    options: dict[str, Any] = {"prompts": None, "rewards": [], "num_steps": None, "limit": None, "guidance": []}
    out = tmp_path / "grid"
    compare(str(run_config(tmp_path)), vs=[str(adapter)], seeds=2, out=out, **options)
    found = json.loads((out / "report.json").read_text())
    assert found["labels"] == ["base", adapter.name]
    assert (found["temperature"], found["max_new_tokens"], found["identical_noise"]) == (1.0, 30, True)
    assert found["rewards"]["synthetic_answers"]["n_seeds"] == 2
    with Image.open(out / "grid.png") as picture:
        assert picture.width > 1000
    # The exported adapter on a fresh base says what the policy said that exported it.
    assert list(responses(out).values()) == list(responses(tmp_path / "direct").values())
    assert responses(out)["base"] != responses(out)[adapter.name]
    greedy = tmp_path / "greedy"
    compare(str(run_config(tmp_path)), vs=[str(adapter)], seeds=2, out=greedy, temperature=0.0, **options)
    assert json.loads((greedy / "report.json").read_text())["seeds"] == [0]
    with pytest.raises(ConfigError, match=r"guidance_scale = \[5\.0\] would do nothing: llava models have none"):
        compare(str(run_config(tmp_path)), vs=[str(adapter)], seeds=2, out=out, **{**options, "guidance": [5.0]})
    with pytest.raises(ValueError, match="'aesthetic' scores images"):
        compare(str(run_config(tmp_path)), vs=[str(adapter)], seeds=2, out=out, **{**options, "rewards": ["aesthetic"]})


def test_previews_show_the_base_and_the_present(policy: Any, adapter: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"preview_prompts": 3})
    draw_preview(policy, settings, "policy", tmp_path / "samples" / "step_1.png", "step 1")
    kept = list((tmp_path / "samples").glob("base_*.json"))
    assert len(kept) == 1
    base = json.loads(kept[0].read_text())
    assert len(base) == 3
    # The base is asked once: what lies there is drawn again.
    kept[0].write_text(json.dumps([f"kept {text}" for text in base]))
    draw_preview(policy, settings, "policy", tmp_path / "samples" / "step_2.png", "step 2")
    first, second = (Image.open(tmp_path / "samples" / f"step_{n}.png").convert("RGB") for n in (1, 2))
    assert first.tobytes() != second.tobytes()
    assert len(list((tmp_path / "samples").iterdir())) == 3
