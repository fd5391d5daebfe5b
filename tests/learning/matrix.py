"""The learning matrix: every recipe on every seed, judged by the exact scorer on prompts or scenes no training saw.

    python tests/learning/matrix.py --split heldout --seeds 0 1 2 --save     # what `make test-learning` runs
    python tests/learning/matrix.py --split dev --only dpo_full --seeds 0 --set train.learning_rate=1e-4

Settings are chosen on the dev split; held-out is scored once. Headline: graded win rate (mean soft sub-score, ties ½);
beside it the win rate on the number of right attributes and the share of images with all attributes right. Language
models: see answers.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mmalign
from mmalign.config import load_config
from mmalign.evaluation.statistics import seed_matrix, wins

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))
import answers

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.json")
MEASURES = ("graded", "fraction", "all_right")


@dataclass(frozen=True)
class Recipe:
    """A shipped config, changed by overrides; `claim` says what its graded win rate without guidance, or `at both` scales, or
    its hallucination, must show. Beside it the least graded win rate without guidance, and the least lower bound of its
    interval at the default guidance."""

    config: str
    overrides: tuple[str, ...] = ()
    claim: str = ""
    least_win: float = 0.0
    least_bound: float = 0.0

    @property
    def answers(self) -> bool:
        return self.config.startswith("synthetic/llava")

    @property
    def draws_pairs(self) -> bool:
        """Whether the training pairs are drawn anew for each seed; else seeds change order, draws and initialisation."""
        return load_config(self.config).config.data.path == "builtin:synthetic"


RECIPES = {
    "dpo_full": Recipe("synthetic/sdxl_diffusion_dpo_full.yaml", (), "better at both", 0.65, 0.45),
    "dpo_full_swapped": Recipe(
        "synthetic/sdxl_diffusion_dpo_full.yaml", ("data.swap=true", "train.stop=null"), "worse at both"
    ),
    "dpo_full_shuffled": Recipe("synthetic/sdxl_diffusion_dpo_full.yaml", ("data.label_noise=0.5",), "at 50 at both"),
    # Without the model's own samples among the losers.
    "dpo_drawn": Recipe("synthetic/sdxl_diffusion_dpo_drawn_full.yaml", (), "better"),
    "dpo_guided": Recipe("synthetic/sdxl_diffusion_dpo_guided_full.yaml", (), "better"),
    "dpo_guided_swapped": Recipe("synthetic/sdxl_diffusion_dpo_guided_full.yaml", ("data.swap=true",), "worse"),
    "dpo_guided_shuffled": Recipe(
        "synthetic/sdxl_diffusion_dpo_guided_full.yaml", ("data.label_noise=0.5",), "at 50 at both"
    ),
    "dpo_lora": Recipe("synthetic/sdxl_diffusion_dpo_lora.yaml", (), "better"),
    "dpo_lora_shuffled": Recipe("synthetic/sdxl_diffusion_dpo_lora.yaml", ("data.label_noise=0.5",), "not better"),
    "dpo_anchored": Recipe("synthetic/sdxl_diffusion_dpo_anchored_full.yaml", (), "better at both"),
    "mapo_full": Recipe("synthetic/sdxl_mapo_full.yaml", (), "better", 0.65, 0.45),
    "mapo_full_swapped": Recipe("synthetic/sdxl_mapo_full.yaml", ("data.swap=true",), "worse at both"),
    "mapo_lora": Recipe("synthetic/sdxl_mapo_lora.yaml", (), "better"),
    # The winner term alone, on the same rows and settings as mapo_full: what the margin adds is the difference.
    "sft_full": Recipe("synthetic/sdxl_mapo_full.yaml", ("method.preset=sft",), "control"),
    "flow_dpo_full": Recipe("synthetic/sd3_flow_dpo_full.yaml", (), "better at both"),
    "flow_dpo_full_swapped": Recipe("synthetic/sd3_flow_dpo_full.yaml", ("data.swap=true",), "worse at both"),
    "flow_dpo_full_shuffled": Recipe("synthetic/sd3_flow_dpo_full.yaml", ("data.label_noise=0.5",), "not better"),
    "flow_mapo_full": Recipe("synthetic/sd3_mapo_full.yaml", (), "better at both"),
    "flow_mapo_full_swapped": Recipe("synthetic/sd3_mapo_full.yaml", ("data.swap=true",), "worse at both"),
    "grpo_full": Recipe("synthetic/sdxl_dance_grpo_full.yaml", (), "better"),
    "grpo_full_flipped": Recipe(
        "synthetic/sdxl_dance_grpo_full.yaml", ("rewards=[{name: synthetic_truth, weight: -1}]",), "worse at both"
    ),
    "flow_grpo_full": Recipe("synthetic/sd3_flow_grpo_full.yaml", (), "better"),
    "flow_grpo_full_flipped": Recipe(
        "synthetic/sd3_flow_grpo_full.yaml", ("rewards=[{name: synthetic_truth, weight: -1}]",), "worse at both"
    ),
    "flow_dance_full": Recipe("synthetic/sd3_dance_grpo_full.yaml", (), "better"),
    "flow_dance_full_flipped": Recipe(
        "synthetic/sd3_dance_grpo_full.yaml", ("rewards=[{name: synthetic_truth, weight: -1}]",), "worse at both"
    ),
    "llava_dpo": Recipe("synthetic/llava_dpo_lora.yaml", (), "hallucinates less"),
    "llava_mdpo": Recipe("synthetic/llava_mdpo_lora.yaml", (), "hallucinates less"),
    "llava_dpo_blind": Recipe("synthetic/llava_dpo_lora.yaml", ("data.blind=true",), "as the base"),
    "llava_nll": Recipe("synthetic/llava_dpo_lora.yaml", ("method.preset=nll", "data.cache_reference=0"), "control"),
}

DIFFERENCES = {"mapo_minus_sft": ("mapo_full", "sft_full"), "guided_minus_published": ("dpo_guided", "dpo_drawn")}


def train(recipe: Recipe, *, seed: int, split: str, folder: Path, extra: tuple[str, ...] = ()) -> Path:
    """Train and evaluate one recipe; returns the run folder."""
    overrides = [
        *recipe.overrides,
        f"train.seed={seed}",
        *([f"data.options.seed={seed}"] if recipe.draws_pairs else []),
        f"evaluate.prompts=builtin:{'scenes' if recipe.answers else 'attributes'}_{split}",
        "evaluate.held_out=[]",
        "checkpoint.every=null",
        "run.tracker=none",
        f"output_dir={folder}",
        *extra,
    ]
    return mmalign.train(recipe.config, overrides).folder


def scores(run: Path) -> dict[tuple[str, float], dict[str, np.ndarray]]:
    """(measure, guidance scale) -> {"base": [P, S], "tuned": [P, S]} from the run's scores.jsonl."""
    cells: dict[tuple[str, float], dict[str, dict[tuple[str, int], float]]] = {}
    for line in (run / "scores.jsonl").read_text().splitlines():
        record = json.loads(line)
        for measure in MEASURES:
            value = record["scores"][f"synthetic_truth.{measure}"]
            key = (measure, float(record["guidance_scale"]))
            cells.setdefault(key, {}).setdefault(record["label"], {})[record["prompt"], record["seed"]] = value
    found = {}
    for key, labels in cells.items():
        order = sorted(labels["base"])
        num_seeds = len({seed for _, seed in order})
        found[key] = {
            label: np.array([float(values[place]) for place in order]).reshape(-1, num_seeds)
            for label, values in labels.items()
        }
    return found


def summarise(runs: list[Path]) -> dict[str, Any]:
    """Over training seeds: win rates with intervals (bootstrap over prompts of the mean over seeds) and shares."""
    per_seed = [scores(run) for run in runs]
    table: dict[str, Any] = {}
    for measure, guidance in per_seed[0]:
        both = [found[measure, guidance] for found in per_seed]
        matrix = seed_matrix(np.stack([wins(one["base"], one["tuned"]) for one in both]))
        table[f"{measure}@g{guidance:g}"] = {
            "win_rate": round(matrix.mean, 4),
            "interval": [round(edge, 4) for edge in matrix.interval],
            "per_seed": [round(value, 4) for value in matrix.per_seed],
            "base": round(float(np.mean([one["base"].mean() for one in both])), 4),
            "tuned": round(float(np.mean([one["tuned"].mean() for one in both])), 4),
        }
    steps = [json.loads((run / "summary.json").read_text())["steps"] for run in runs]
    last = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in runs]
    watched = ("chosen_error_delta", "implicit_accuracy", "reward", "diversity")
    table["steps"] = steps
    table["last_metrics"] = [{name: metrics[name] for name in watched if name in metrics} for metrics in last]
    return table


def difference(first: list[Path], second: list[Path], measure: str, guidance: float) -> dict[str, Any]:
    """Win rate of `first` over the base minus that of `second`, paired by prompt, image seed and training seed."""
    pairs = [[scores(run)[measure, guidance] for run in runs] for runs in (first, second)]
    values = [wins(a["base"], a["tuned"]) - wins(b["base"], b["tuned"]) for a, b in zip(*pairs, strict=True)]
    matrix = seed_matrix(np.stack(values))
    return {
        "difference": round(matrix.mean, 4),
        "interval": [round(edge, 4) for edge in matrix.interval],
        "per_seed": [round(value, 4) for value in matrix.per_seed],
    }


def show(name: str, table: dict[str, Any]) -> None:
    for key, row in table.items():
        if isinstance(row, dict):
            low, high = row["interval"]
            seeds = " ".join(f"{value:.3f}" for value in row["per_seed"])
            print(
                f"{name:<20} {key:<15} win {row['win_rate']:.3f} [{low:.3f}, {high:.3f}]  seeds {seeds}  "
                f"mean {row['base']:.3f} -> {row['tuned']:.3f}",
                flush=True,
            )
    print(f"{name:<20} steps {table['steps']} last {table['last_metrics']}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=["dev", "heldout"], default="dev")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=sorted(RECIPES), default=list(RECIPES))
    parser.add_argument("--save", action="store_true", help="put these recipes into results.json beside this file")
    parser.add_argument("--keep", type=Path, help="keep the run folders here (and reuse finished ones)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for every recipe")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    started = time.monotonic()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="mmalign-learning-"))
    results: dict[str, Any] = {}
    runs: dict[str, list[Path]] = {}
    for name in options.only:
        runs[name] = [
            train(
                RECIPES[name],
                seed=seed,
                split=options.split,
                folder=folder / f"{name}-{seed}",
                extra=tuple(options.set),
            )
            for seed in options.seeds
        ]
        if RECIPES[name].answers:
            table = answers.summarise(runs[name]) | answers.image_accuracy(runs[name], options.split)
            answers.show(name, table)
        else:
            table = summarise(runs[name])
            show(name, table)
        results[name] = table
    for name, (first, second) in DIFFERENCES.items():
        if {first, second} <= runs.keys():
            scales = sorted({guidance for _, guidance in scores(runs[first][0])})
            results[name] = {f"graded@g{g:g}": difference(runs[first], runs[second], "graded", g) for g in scales}
            print(name, json.dumps(results[name]), flush=True)
    how = {
        "command": " ".join(
            [
                "python",
                "tests/learning/matrix.py",
                *("RUNS" if word == str(options.keep) else word for word in arguments),
            ]
        ),
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else ""),
        "split": options.split,
        "seeds": options.seeds,
    }
    if options.save:
        # What was not run now keeps its own record.
        kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        merged = {**kept, **{name: {**how, **table} for name, table in results.items()}}
        RESULTS.write_text(json.dumps(merged, indent=1) + "\n")
        print(f"written: {RESULTS.relative_to(ROOT)} ({time.monotonic() - started:.0f} s)")
    return 0


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
