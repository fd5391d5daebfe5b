"""Mistakes in the config and in the paths it names: found before anything is loaded or written."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import mmalign
from mmalign.config import ConfigError
from mmalign.types import DataError


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("train", "learnin_rate", 1e-4, "unknown key 'train.learnin_rate' (did you mean 'learning_rate'?)"),
        ("data", "on_bad_rows", "skip", "unknown key 'data.on_bad_rows' (did you mean 'on_bad_row'?)"),
        ("method", "bta", 1, "no option 'bta'"),
        ("train", "steps", "many", "train.steps = 'many'"),
        ("train", "batch_size", 0, "train.batch_size = 0"),
        ("model", "lora", {"rank": "eight"}, "model.lora.rank = 'eight'"),
        ("data", "on_bad_row", "ignore", "data.on_bad_row = 'ignore'"),
        ("model", "family", "sdlx", "unknown family 'sdlx' (did you mean 'sdxl'?)"),
        ("method", "preset", "difusion_dpo", "(did you mean 'diffusion_dpo'?)"),
        ("data", "format", "jsonll", "unknown reader 'jsonll' (did you mean 'jsonl'?)"),
        ("data", "options", {"num_pair": 8}, "no option 'num_pair' (did you mean 'num_pairs'?)"),
        (
            "train",
            "stop",
            {"metric": "loss_dpp", "below": 0.5},
            "'loss_dpp' is not logged by this method (did you mean 'loss_dpo'?)",
        ),
        ("evaluate", "rewards", ["clipp"], "unknown reward 'clipp' (did you mean 'clip'?)"),
    ],
)
def test_misspelt_keys_names_and_wrong_types(
    tiny: Callable, refused: Callable, section: str, key: str, value: object, says: str
):
    refused(tiny(**{section: {key: value}}), ConfigError, says)


MISSING_PACKAGES = [
    (
        "bitsandbytes",
        {"train": {"optimizer": "adamw_8bit"}},
        "train.optimizer = 'adamw_8bit' needs bitsandbytes: pip install 'mmalign[quant]', or use adamw or adafactor",
    ),
    *(
        (name, {"run": {"tracker": name}}, f"run.tracker = '{name}' needs the package: pip install 'mmalign[tracking]'")
        for name in ("trackio", "wandb")
    ),
]


@pytest.mark.parametrize(("package", "sections", "says"), MISSING_PACKAGES)
def test_a_missing_package_is_named_before_anything_is_read(
    tiny: Callable, refused: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package, sections, says
):
    """Neither model nor data exist: whatever was read before the package is asked for would be named instead."""
    monkeypatch.setitem(sys.modules, package, None)
    nowhere = {"model": {"path": str(tmp_path / "model")}, "data": {"path": str(tmp_path / "data")}}
    refused(tiny(nowhere, sections), ValueError, says)


@pytest.mark.parametrize(("package", "sections", "says"), MISSING_PACKAGES)
def test_doctor_names_a_missing_package(
    tiny: Callable, command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package, sections, says
):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny(sections)))
    code, out, _ = command("doctor", tmp_path / "config.yaml")
    assert (code, out.splitlines()[-1]) == (1, f"problem {says}")


def test_missing_section_is_named(tiny: Callable, refused: Callable):
    config = tiny()
    del config["train"]
    refused(config, ConfigError, "missing key 'train'")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"train: {steps: 1, steps: 2}\n", "duplicate key 'steps'"),
        (b"train: [1, 2\n", "not valid YAML"),
        (b"- a list\n", "expected a mapping of sections, found list"),
        (b"output_dir: caf\xe9\n", "not UTF-8 text (invalid continuation byte at byte 15)"),
        (b"", "expected a mapping of sections, found NoneType"),
    ],
)
def test_unreadable_config_file(tmp_path: Path, content: bytes, says: str):
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        mmalign.train(file)
    assert says in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_data_model_and_prompts(tiny: Callable, refused: Callable, tmp_path: Path):
    gone = str(tmp_path / "gone.jsonl")
    data = {"path": gone, "format": "auto", "options": {}}
    refused(tiny(data=data), DataError, gone, "does not exist")
    refused(tiny(data={**data, "format": "jsonl"}), DataError, gone, "does not exist")
    refused(tiny(model={"path": str(tmp_path / "no-model")}), ValueError, "no-model", "cannot load")
    refused(tiny(evaluate={"prompts": str(tmp_path / "gone.txt")}), ValueError, "gone.txt", "is not a file")
    refused(tiny(evaluate={"prompts": "builtin:held_out"}), ValueError, "'builtin:held_out' is not bundled")


def test_reward_file_with_a_syntax_error_is_named_with_its_line(tiny: Callable, refused: Callable, tmp_path: Path):
    file = tmp_path / "broken_reward.py"
    file.write_text('"""A reward."""\n\ndef brightness(images):\n    return [1.0 for image in images\n')
    evaluate = {"rewards": [f"{file}:brightness"]}
    refused(tiny(evaluate=evaluate), ConfigError, str(file), "line 4", "'[' was never closed")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import no_such_package\n", "No module named 'no_such_package'"),
        ("raise RuntimeError('first\\nsecond')\n", "first"),
        ("def other(images): ...\n", "has no 'brightness'"),
    ],
)
def test_reward_file_that_cannot_be_used(tiny: Callable, refused: Callable, tmp_path: Path, source: str, says: str):
    file = tmp_path / "reward.py"
    file.write_text(source)
    refused(tiny(evaluate={"rewards": [f"{file}:brightness"]}), ConfigError, str(file), says)


def test_config_of_another_model_does_not_touch_the_run(tiny: Callable, refused: Callable):
    mmalign.train(tiny(train={"steps": 1}))
    other = tiny(model={"family": "sd15", "path": "builtin:sd15-tiny"}, train={"steps": 1})
    refused(other, ConfigError, "model.family: 'sdxl' -> 'sd15'", "model.path", "Give a new output_dir")
    refused(tiny(model={"lora": {"rank": 2}}, train={"steps": 1}), ConfigError, "model.lora")


def test_output_dir_that_cannot_be_written(tiny: Callable, refused: Callable, tmp_path: Path):
    (tmp_path / "file").write_text("precious")
    refused(tiny(output_dir=str(tmp_path / "file")), ConfigError, "is a file; give a folder")
    below = str(tmp_path / "file" / "run")
    refused(tiny(output_dir=below), ConfigError, repr(below), "cannot be written: Not a directory")
    assert (tmp_path / "file").read_text() == "precious"


def test_output_dir_without_permission(tiny: Callable, tmp_path: Path):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    config = tiny(output_dir=str(closed / "run"))
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # permissions do not bind root
        with pytest.raises(ConfigError, match=r"cannot be written: Permission denied\. Give a folder"):
            mmalign.train(config)
    finally:
        os.seteuid(user)
        closed.chmod(0o700)
    assert list(closed.iterdir()) == []
