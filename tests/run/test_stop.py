"""The stop rule: where it ends a run, above or below its bound, and after a kill at the same step as without one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import mmalign
from mmalign.config import ConfigError, load_config
from mmalign.run.checkpoint import complete, read_state
from mmalign.run.preflight import PreflightError

SMOOTHING = 0.5
STEPS, LOG_EVERY = 16, 2


@pytest.fixture
def watched(tiny: Callable, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`watched("run", above=…)`: a config that logs every second step and keeps each checkpoint."""

    def make(name: str, **stop: Any) -> dict[str, Any]:
        rule = {"smoothing": SMOOTHING, **stop} if stop else None
        return tiny(
            train={"steps": STEPS, "batch_size": 2, "stop": rule},
            run={"log_every": LOG_EVERY},
            checkpoint={"every": 1, "keep": STEPS},
            output_dir=str(tmp_path / name),
        )

    return make


def averages(folder: Path, metric: str) -> list[float]:
    """The moving average after each logged line, by hand."""
    values = [json.loads(line)[metric] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = values[:1]
    for value in values[1:]:
        found.append(SMOOTHING * found[-1] + (1 - SMOOTHING) * value)
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(complete(folder / "checkpoints")[-1] / "weights.safetensors")


@pytest.mark.parametrize(("side", "metric"), [("above", "chosen_error_delta"), ("below", "grad_norm")])
def test_a_run_ends_where_the_average_crosses_and_a_killed_one_too(
    watched: Callable, tmp_path: Path, side: str, metric: str
):
    free = averages(mmalign.train(watched("free")).folder, metric)
    extreme, next_to_it = sorted(free, reverse=side == "above")[:2]
    line = free.index(extreme)
    assert 1 < line < len(free) - 1, "the rule must fire on the way"
    rule = {"metric": metric, side: (extreme + next_to_it) / 2}
    whole = mmalign.train(watched("whole", **rule))
    stopped_at = LOG_EVERY * (line + 1)
    assert whole.summary["status"] == "stopped"
    assert whole.summary["steps"] == stopped_at
    final = complete(whole.folder / "checkpoints")[-1]
    assert read_state(final).stop_average == pytest.approx(extreme)

    # As if killed between two logged lines: the average and half a line's sums are in the checkpoint.
    killed = tmp_path / "killed"
    shutil.copytree(whole.folder, killed)
    (killed / "summary.json").unlink()
    for checkpoint in complete(killed / "checkpoints"):
        if int(checkpoint.name[5:]) > stopped_at - LOG_EVERY - 1:
            shutil.rmtree(checkpoint)
    again = mmalign.train(watched("killed", **rule))
    assert (again.summary["status"], again.summary["steps"]) == ("stopped", stopped_at)
    assert read_state(complete(killed / "checkpoints")[-1]).stop_average == read_state(final).stop_average
    first, second = weights(whole.folder), weights(killed)
    assert all(torch.equal(first[name], second[name]) for name in first)

    # As if killed after the last checkpoint: what is left to do is not training.
    (killed / "summary.json").unlink()
    shutil.rmtree(killed / "final")
    done = mmalign.train(watched("killed", **rule))
    assert (done.summary["status"], done.summary["steps"]) == ("stopped", stopped_at)
    assert (killed / "final").is_dir()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "exactly one of above and below, got above = None and below = None"),
        (
            {"above": 1.0, "below": 0.5},
            "exactly one of above and below, got above = 1.0 and below = 0.5; set the other to null",
        ),
        ({"under": 1.0}, "unknown key 'train.stop.under'"),
        ({"below": 0.5, "smoothing": 1.0}, "train.stop.smoothing = 1.0"),
    ],
)
def test_a_rule_that_cannot_work_is_a_config_error(tiny: Callable, rule: dict[str, float], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(tiny(train={"stop": {"metric": "loss", **rule}}))


ANSWERS = {
    "model": {"family": "llava", "path": "builtin:llava-tiny"},
    "data": {"path": "builtin:synthetic_answers", "format": "synthetic_answers"},
}


@pytest.mark.parametrize(
    ("sections", "preset"), [({}, "diffusion_dpo"), ({}, "mapo"), ({}, "sft"), (ANSWERS, "mdpo"), (ANSWERS, "nll")]
)
def test_the_names_a_method_gives_before_anything_is_loaded_are_what_a_run_logs(
    tiny: Callable, sections: dict[str, Any], preset: str
):
    never = {"metric": "chosen_error_dleta", "above": 1e9}
    config = tiny(sections, method={"preset": preset}, train={"steps": 1, "stop": never})
    with pytest.raises(ConfigError, match="'chosen_error_dleta' is not logged by this method") as caught:
        load_config(config)
    names = str(caught.value).partition("Logged: ")[2].split(", ")
    config["train"]["stop"] = {"metric": names[0], "above": 1e9}
    (line,) = (mmalign.train(config).folder / "metrics.jsonl").read_text().splitlines()
    assert names == sorted(json.loads(line).keys() - {"step", "learning_rate", "pairs_per_second"})


@pytest.mark.parametrize("command", ["train", "doctor", "explain"])
def test_a_misspelt_metric_is_one_line_of_each_command(
    tiny: Callable, mmalign_cli: Callable, tmp_path: Path, command: str
):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny(train={"stop": {"metric": "grad_nrom", "below": 0.5}})))
    done = mmalign_cli(command, config)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "train.stop.metric = 'grad_nrom' is not logged by this method (did you mean 'grad_norm'?). Logged: " in line
    assert not (tmp_path / "run").exists()


OWN_METHOD = """
from mmalign.types import LossPart, Request


class Own:
    loop, accepts, requests_per_row = "offline", frozenset({"surrogate"}), 1
    needs_reference, needs_negative, sides, golden_loss = False, False, ("chosen",), GOLDEN
    sides = ("chosen",)

    def check_rows(self, rows):
        pass

    def requests(self, batch):
        return [Request(*each) for each in zip(batch.context, batch.chosen, batch.keys)]

    def loss(self, batch, policy, reference_R):
        return LossPart(-policy.value_R, {"squared_error": -2 * policy.value_R.detach()})
"""


def test_what_only_the_first_batch_can_tell_leaves_the_folder_free(tiny: Callable, tmp_path: Path):
    """A method that cannot be asked for its names, and one whose declared golden loss is wrong."""
    method, run = tmp_path / "own.py", tmp_path / "run"
    config = tiny(
        train={"steps": 1, "stop": {"metric": "square_error", "above": 1e9}}, method={"name": f"{method}:Own"}
    )
    config["method"].pop("preset")
    method.write_text(OWN_METHOD.replace("GOLDEN", "None"))
    with pytest.raises(
        ConfigError,
        match=r"'square_error' is not logged.*did you mean 'squared_error'.* Logged: grad_norm, loss, squared",
    ):
        mmalign.train(config)
    assert not run.exists()
    config["train"]["stop"]["metric"] = "squared_error"
    method.write_text(OWN_METHOD.replace("GOLDEN", "1e3"))
    with pytest.raises(PreflightError, match="expected 1000"):
        mmalign.train(config)
    assert not run.exists()
    method.write_text(OWN_METHOD.replace("GOLDEN", "None"))
    assert mmalign.train(config).summary["status"] == "finished"
