"""The online loop: what is sampled, what a broken reward does, what is logged, and that a replay equals its rollout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mmalign
from mmalign.config import ConfigError, load_config
from mmalign.data.groups import Groups
from mmalign.policies.load import load_policy
from mmalign.reward import RewardError
from mmalign.run.checkpoint import complete
from mmalign.run.panel import diversity
from mmalign.run.preflight import PreflightError, probe_rollout
from mmalign.trainers.grpo import GroupPolicyGradient
from mmalign.types import DrawKey, Row

from .online import FLOW, online_config, write_rewards


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, FLOW], ids=["diffusion", "flow"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_run_logs_rewards_ratio_and_phases(model: dict, lora: bool, tmp_path: Path):
    rewards = write_rewards(tmp_path)
    config = online_config(tmp_path, [f"{rewards}:red", {"name": "synthetic_truth", "weight": 0.5}])
    for name, value in model.items():
        config[name] = {**config[name], **value}
    if lora:
        config["model"]["lora"] = {"rank": 4, "targets": "all"}
    config["evaluate"] = {"held_out": ["aesthetic"]}
    result = mmalign.train(config)
    logged = lines(result.folder)
    assert [line["step"] for line in logged] == list(range(1, 7))
    for line in logged:
        assert {"reward", "reward/red", "reward/synthetic_truth", "held_out/aesthetic", "diversity"} <= line.keys()
        assert line["invalid_share"] == 0
    # The first update follows a rollout of the very same weights, the second does not.
    for first, second in zip(logged[::2], logged[1::2], strict=True):
        assert abs(first["ratio"] - 1) < 1e-6
        assert first["clipped_low"] == first["clipped_high"] == 0
        assert first["reward"] == second["reward"]
        assert second["approx_kl"] > 0
    assert {"rollout", "reward", "update"} <= result.summary["seconds"].keys()
    assert result.summary["samples_per_second"] > 0
    assert (result.folder / "final").is_dir()


def test_kl_term_starts_at_zero_and_pulls_back(tmp_path: Path):
    rewards = write_rewards(tmp_path)
    free = online_config(tmp_path, [f"{rewards}:red"], train={"learning_rate": 1e-3}, output_dir=str(tmp_path / "free"))
    held = {**free, "method": {**free["method"], "kl_weight": 10.0}, "output_dir": str(tmp_path / "held")}
    watched = {**free, "method": {**free["method"], "kl_weight": 1e-9}, "output_dir": str(tmp_path / "watched")}
    kl = [[line["kl"] for line in lines(mmalign.train(config).folder)] for config in (held, watched)]
    assert kl[0][0] == kl[1][0] == 0
    assert 0 < kl[0][-1] < kl[1][-1]


# --- replay -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["diffusion", "flow"])
def stepping(request):
    """A policy, its trajectory at guidance 2, and the plan it came from."""
    section = {"family": "sdxl", "path": "builtin:sdxl-tiny"} if request.param == "diffusion" else FLOW["model"]
    config = load_config(
        {
            "model": section,
            "method": {"preset": "sft"},
            "data": {"path": "builtin:synthetic", "format": "synthetic"},
            "train": {"steps": 1, "batch_size": 1, "learning_rate": 1e-4},
            "output_dir": "unused",
        }
    ).config
    policy = load_policy(config.model, device="cpu")
    kernel = {"kernel": "ddim", "level": 1.0} if request.param == "diffusion" else {"kernel": "flow_sde", "level": 0.7}
    steps = policy.rollout_steps(**kernel, num_steps=6)
    contexts = policy.encode_prompts(
        ["a large red circle on a white background", "a small blue cross on a gray background"]
    )
    keys = [DrawKey(0, "row", 0), DrawKey(0, "row", 1)]
    index_BS = torch.tensor([[0, 2, 4], [3, 1, 0]])
    trajectory = policy.rollout(
        contexts, keys=keys, first_keys=keys, steps=steps, index_BS=index_BS, guidance_scale=2.0
    )
    return policy, trajectory, steps


def replayed(policy: Any, trajectory: Any) -> torch.Tensor:
    replay = policy.replayer(trajectory)
    with torch.no_grad():
        return torch.stack([replay(column).log_prob_B for column in range(trajectory.index_BS.shape[1])], dim=1)


def test_replay_equals_recorded(stepping):
    policy, trajectory, _ = stepping
    assert float((replayed(policy, trajectory) - trajectory.log_prob_BS).abs().max()) < 1e-6
    assert probe_rollout(policy, trajectory, dtype="fp32")


@pytest.mark.parametrize("fault", ["sigma", "guidance", "dtype"])
def test_planted_fault_in_the_update_path_is_caught(stepping, fault):
    """A wrong σ, guidance left out, or latents kept in bf16: each moves log-probs by more than the allowed 1e-6."""
    import dataclasses

    policy, trajectory, _ = stepping
    if fault == "sigma":
        shifted = dataclasses.replace(trajectory.steps, std_S=trajectory.steps.std_S * 1.001)
        wrong = dataclasses.replace(trajectory, steps=shifted)
    elif fault == "guidance":
        wrong = dataclasses.replace(trajectory, guidance_scale=1.0)
    else:
        wrong = dataclasses.replace(trajectory, next=trajectory.next.bfloat16().float())
    with pytest.raises(PreflightError, match="other log-probs than were recorded"):
        probe_rollout(policy, wrong, dtype="fp32")


def test_rollout_at_level_zero_is_the_stock_sampler(stepping):
    """The ODE rollout from a pipeline's own noise ends where the stock pipeline does."""
    policy, _, _ = stepping
    prompt = "a large red circle on a white background"
    steps = policy.rollout_steps(kernel="ode", level=0.0, num_steps=5)  # divides the 1000 timesteps: equal spacing
    key = [DrawKey(3, "x", 0)]
    trajectory = policy.rollout(
        policy.encode_prompts([prompt]),
        keys=key,
        first_keys=key,
        steps=steps,
        index_BS=torch.zeros(1, 0, dtype=torch.int64),
        guidance_scale=2.0,
    )
    start = policy.noise(policy.latent_shape, "rollout start", key)
    stock = policy.pipe(
        prompt=prompt,
        latents=start,
        height=policy.resolution,
        width=policy.resolution,
        guidance_scale=2.0,
        num_inference_steps=5,
        output_type="latent",
        return_dict=False,
        **policy.sampling_options(),
    )[0]
    assert float((trajectory.latents - stock).abs().max()) < 2e-4


def test_group_noise_is_shared_or_not():
    rows = [Row(id=f"r{i}", prompt=f"prompt {i}", source=f"f:{i}") for i in range(5)]
    settings = {"seed": 0, "group_size": 4, "prompts_per_rollout": 2, "updates_per_rollout": 2, "batch_size": 2}
    shared = Groups(rows, None, **settings, shared_noise=True).samples(3)
    assert len({sample.first_key for sample in shared}) == 2
    own = Groups(rows, None, **settings, shared_noise=False).samples(3)
    assert len({sample.first_key for sample in own}) == 8
    assert [sample.key for sample in shared] == [sample.key for sample in own]


def test_two_processes_draw_and_train_what_one_does():
    rows = [Row(id=f"r{i}", prompt=f"prompt {i}", source=f"f:{i}") for i in range(5)]
    settings = {"seed": 0, "group_size": 4, "prompts_per_rollout": 4, "updates_per_rollout": 2, "batch_size": 2}
    settings["shared_noise"] = False
    one = Groups(rows, None, **settings).mine(1)
    two = [Groups(rows, None, **settings, rank=rank, world_size=2).mine(1) for rank in (0, 1)]
    for update in (0, 1):
        dealt = [micro for rank in two for micro in rank[update]]
        key = lambda micro: [sample.index for sample in micro]  # noqa: E731
        assert sorted(map(key, one[update])) == sorted(map(key, dealt))
        straddling = set.intersection(*({s.group for micro in rank[update] for s in micro} for rank in two))
        assert straddling, "no group straddles the processes: the test would show nothing"


def test_uneven_samples_are_refused():
    rows = [Row(id="r", prompt="p", source="f:0")]
    with pytest.raises(ConfigError, match="must be a multiple of 12"):
        Groups(rows, None, seed=0, group_size=4, prompts_per_rollout=2, updates_per_rollout=2, batch_size=3,
               shared_noise=False, world_size=2)  # fmt: skip


def test_diversity_is_zero_for_equal_samples():
    assert diversity(torch.ones(4, 3), torch.tensor([0, 0, 1, 1])) == 0
    assert diversity(torch.eye(4), torch.tensor([0, 0, 1, 1])) > 0


# --- rewards that fail ------------------------------------------------------------------------------------------------


def failing(tmp_path: Path, name: str, **options: Any) -> dict[str, Any]:
    rewards = write_rewards(tmp_path)
    config = online_config(tmp_path, [{"name": f"{rewards}:{name}", **options}, f"{rewards}:red"])
    config["train"] = {**config["train"], "steps": 2}
    return config


def test_missing_scores_are_left_out_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture):
    result = mmalign.train(failing(tmp_path, "raises_sometimes"))
    shares = {line["invalid_share"] for line in lines(result.folder)}
    assert shares <= {0.0, 0.5, 1.0}
    failures = [json.loads(line) for line in (result.folder / "reward_failures.jsonl").read_text().splitlines()]
    assert len(failures) == 4
    assert {failure["reward"] for failure in failures} == {"raises_sometimes"}
    assert "the judge is down" in failures[0]["reason"]
    assert "left out of the update" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "reason"),
    [("never", "no score"), ("raises", "the judge is down"), ("hangs", "no answer within 0.2 s")],
)
def test_a_reward_without_any_score_stops_the_run(tmp_path: Path, name: str, reason: str):
    config = failing(tmp_path, name, timeout=0.2) if name == "hangs" else failing(tmp_path, name)
    with pytest.raises(RewardError, match=rf"reward '{name}' gave no valid score for any of the 8 samples.*{reason}"):
        mmalign.train(config)
    assert (tmp_path / "run" / "reward_failures.jsonl").read_text().count("\n") == 8
    assert not (tmp_path / "run" / "final").exists()
    assert not complete(tmp_path / "run" / "checkpoints"), "nothing was trained: the config may still change"


def test_a_reward_of_the_wrong_length_stops_the_run(tmp_path: Path):
    with pytest.raises(RewardError, match="reward 'short'"):
        mmalign.train(failing(tmp_path, "short"))


@pytest.mark.parametrize(
    ("how", "reason"),
    [("raises", "gave no valid score for any of the 8 samples of iteration 1"), ("short", "returned 1 score")],
)
def test_a_reward_that_fails_later_loses_nothing(tmp_path: Path, how: str, reason: str):
    """No checkpoint is due before the end; started again with the reward mended, the run ends as one without a fault."""
    config = online_config(tmp_path, [f"{write_rewards(tmp_path)}:fragile"], train={"steps": 4, "ema": {"decay": 0.9}})
    config["run"]["log_every"] = 3
    whole = mmalign.train({**config, "output_dir": str(tmp_path / "whole")}).folder
    (tmp_path / "calls.txt").unlink()
    (tmp_path / "broken.txt").write_text(how)
    written = []
    for _ in range(2):  # started again before it is mended: what is there is not written anew
        with pytest.raises(
            RewardError, match=rf"{reason}.*a checkpoint of step 2 is written.*start the same command again"
        ):
            mmalign.train(config)
        (found,) = complete(tmp_path / "run" / "checkpoints")
        written.append((found.name, found.stat().st_ino))
    assert written == [("step_2", written[0][1])] * 2
    (tmp_path / "broken.txt").unlink()
    config["rewards"] = [{"name": config["rewards"][0], "timeout": 60}]
    mended = mmalign.train(config).folder
    for name in ("weights", "ema"):
        first, second = (load_file(run / "checkpoints" / "step_4" / f"{name}.safetensors") for run in (whole, mended))
        assert all(torch.equal(first[key], second[key]) for key in first)
    timed = {"samples_per_second"}
    kept = [[{k: v for k, v in line.items() if k not in timed} for line in lines(run)] for run in (whole, mended)]
    assert kept[0] == kept[1]


# --- how often a reward is loaded --------------------------------------------------------------------------------------

COUNTED = """
from pathlib import Path

import numpy as np


class Counted:
    def __init__(self, *, tag: str, batch_size: int = 8):
        self.tag = tag
        self.note("loaded")

    def __call__(self, images, prompts):
        self.note("scored")
        return [float(np.asarray(image, np.float32).mean() / 255) for image in images]

    def __del__(self):
        self.note("freed")

    def note(self, event):
        with Path(__file__).with_name("events.txt").open("a") as file:
            file.write(f"{event} {self.tag}\\n")
"""


def test_a_reward_is_loaded_once_for_training_and_evaluation(tmp_path: Path):
    """What the evaluation alone needs is loaded once to find mistakes, let go, and loaded again when it is used."""
    path = tmp_path / "counted.py"
    path.write_text(COUNTED)
    trained, both, watched, shown = (
        {"name": f"{path}:Counted", "tag": tag} for tag in ("trained", "both", "watched", "shown")
    )
    config = online_config(
        tmp_path,
        [trained, {**both, "weight": 0.5}],
        train={"steps": 2},
        evaluate={
            "prompts": "builtin:attributes_heldout",
            "limit": 1,
            "seeds": 1,
            "num_steps": 2,
            "rewards": [{**both, "batch_size": 3}, shown],
            "held_out": [watched],
        },
    )
    result = mmalign.train(config)
    events = (tmp_path / "events.txt").read_text().splitlines()
    loads = {tag: events.count(f"loaded {tag}") for tag in ("trained", "both", "watched", "shown")}
    assert loads == {"trained": 1, "both": 1, "watched": 1, "shown": 2}
    assert events.index("freed shown") < events.index("scored trained"), "only tried out before the training"
    evaluation = events.index("scored shown")
    reloaded = len(events) - 1 - events[::-1].index("loaded shown")
    assert events.index("freed trained") < reloaded < evaluation < events.index("freed both")
    # The report's names have no gaps, and the training calls those rewards the same.
    logged, reported = lines(result.folder)[-1], result.report["rewards"]
    trained_on = {name: reported[name]["trained_on"] for name in reported}
    assert trained_on == {"Counted": True, "Counted-2": False, "Counted-3": False}
    assert {"reward/Counted", "held_out/Counted-2", "reward/Counted-3"} <= logged.keys()


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": []}, "learns from rewards: name at least one"),
        ({"method": {"kernel": "dance_sde"}}, "does not fit family 'sdxl': must be ddim"),
        ({"method": {"kernel": "euler"}}, "must be ddim, dance_sde or flow_sde"),
        ({"method": {"level": 0.0}}, "must be positive"),
        ({"method": {"group_size": 1}}, "group_size = 1: must be at least 2"),
        ({"method": {"window_size": 9}}, "window size 9: must be 1 to 3"),
        ({"method": {"step_fraction": 0.1}}, "of 3 trainable steps is none"),
        ({"train": {"steps": 5}}, "must be a multiple of method.updates_per_rollout = 2"),
        ({"train": {"batch_size": 3}}, "cannot be dealt out"),
        ({"train": {"stop": {"metric": "rewrad", "above": 1}}}, "train.stop.metric = 'rewrad' would do nothing"),
        ({"train": {"accumulate": 2}}, "train.accumulate = 2 would do nothing"),
        ({"evaluate": {"held_out": [{"name": "clip", "weight": 2}]}}, "weight and timeout belong to training rewards"),
    ],
)
def test_bad_online_config_names_the_key(tmp_path: Path, change: dict, message: str):
    config = online_config(tmp_path, ["synthetic_truth"])
    for name, value in change.items():
        config[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        mmalign.train(config)
    assert not (tmp_path / "run").exists()


def test_rewards_are_refused_by_methods_on_fixed_data(tmp_path: Path):
    config = online_config(tmp_path, ["synthetic_truth"], method={"preset": "sft"})
    config["method"] = {"preset": "sft"}
    with pytest.raises(ConfigError, match="learns from fixed data and would ignore them"):
        mmalign.train(config)


def test_window_moves_with_the_iteration_and_never_reaches_the_end():
    method = GroupPolicyGradient(kernel="flow_sde", level=0.7, num_steps=10, window_size=3, window_high=5)
    windows = [method.window(0, iteration).nonzero().flatten().tolist() for iteration in range(20)]
    assert {tuple(w) for w in windows} == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}
