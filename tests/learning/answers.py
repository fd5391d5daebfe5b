"""What the learning matrix measures on language models: hallucination, recall and length of sampled captions, and whether
the reward of a true caption needs the true image.

Shape legend: P questions, S samples per question, T training seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from mmalign.config import Config, DataConfig, NegativeConfig
from mmalign.data.features import make_features
from mmalign.data.questions import read_questions
from mmalign.evaluation.statistics import seed_matrix
from mmalign.policies.load import load_policy
from mmalign.types import DrawKey, Request, Row

MEASURES = ("grounded", "recall", "exact", "mentioned")
NUM_RESAMPLES = 10_000
BATCH = 50
NUM_CROPS = 4


def scores(run: Path) -> dict[str, dict[str, np.ndarray]]:
    """measure -> {"base": [P, S], "tuned": [P, S]} from the run's answers.jsonl."""
    cells: dict[str, dict[str, dict[tuple[str, int], float]]] = {}
    for line in (run / "answers.jsonl").read_text().splitlines():
        record = json.loads(line)
        for measure in MEASURES:
            value = record["scores"][f"synthetic_answers.{measure}"]
            cells.setdefault(measure, {}).setdefault(record["label"], {})[record["id"], record["seed"]] = value
    found = {}
    for measure, labels in cells.items():
        order = sorted(labels["base"])
        num_seeds = len({seed for _, seed in order})
        found[measure] = {
            label: np.array([float(values[place]) for place in order]).reshape(-1, num_seeds)
            for label, values in labels.items()
        }
    return found


def summarise(runs: list[Path]) -> dict[str, Any]:
    """Over training seeds, with 95 % intervals from a bootstrap over questions of the mean over seeds."""
    per_seed = [scores(run) for run in runs]

    def both(measure: str) -> tuple[np.ndarray, np.ndarray]:
        """[T, P] of base and tuned."""
        pairs = [found[measure] for found in per_seed]
        return np.stack([p["base"].mean(1) for p in pairs]), np.stack([p["tuned"].mean(1) for p in pairs])

    base_TP, tuned_TP = (1 - values for values in both("grounded"))
    index = np.random.default_rng(0).integers(base_TP.shape[1], size=(NUM_RESAMPLES, base_TP.shape[1]))
    base_P, tuned_P = base_TP.mean(0), tuned_TP.mean(0)
    resampled = 1 - tuned_P[index].mean(1) / base_P[index].mean(1)
    table: dict[str, Any] = {
        "hallucination": {
            "base": round(float(base_P.mean()), 4),
            "tuned": round(float(tuned_P.mean()), 4),
            "relative_fall": round(float(1 - tuned_P.mean() / base_P.mean()), 4),
            "interval": [round(float(edge), 4) for edge in np.quantile(resampled, (0.025, 0.975))],
            "per_seed": [round(float(1 - t.mean() / b.mean()), 4) for b, t in zip(base_TP, tuned_TP, strict=True)],
        }
    }
    for measure in ("recall", "exact", "mentioned"):
        before_TP, after_TP = both(measure)
        matrix = seed_matrix((after_TP - before_TP)[:, :, None])
        table[measure] = {
            "base": round(float(before_TP.mean()), 4),
            "tuned": round(float(after_TP.mean()), 4),
            "difference": round(matrix.mean, 4),
            "interval": [round(edge, 4) for edge in matrix.interval],
            "per_seed": [round(value, 4) for value in matrix.per_seed],
        }
    return table


def image_accuracy(runs: list[Path], split: str, scenes: slice | None = None) -> dict[str, dict[str, Any]]:
    """Share of true captions whose reward (log-ratio to the base) is larger with the true image than with a crop of it.

    `image_accuracy`, one crop of each scene, is the measure that targets are set on. A crop of a scene with one object may
    show just that object, so that its caption stays true and nothing says which image should win;
    `image_accuracy_several` leaves these scenes out. `image_accuracy_crops` asks with NUM_CROPS crops: the same share, known
    more sharply.
    """
    found = [image_wins(run, split, scenes) for run in runs]
    several_P = found[0][1] > 1
    wins_TPI = np.stack([wins_PI for wins_PI, _ in found])
    readings = {
        "image_accuracy": wins_TPI[:, :, 0],
        "image_accuracy_several": wins_TPI[:, several_P, 0],
        "image_accuracy_crops": wins_TPI.mean(2),
    }
    return {name: _share(wins_TP) for name, wins_TP in readings.items()}


def _share(wins_TP: np.ndarray) -> dict[str, Any]:
    matrix = seed_matrix(wins_TP[:, :, None])
    return {
        "share": round(matrix.mean, 4),
        "interval": [round(edge, 4) for edge in matrix.interval],
        "per_seed": [round(value, 4) for value in matrix.per_seed],
    }


@torch.no_grad()
def image_wins(run: Path, split: str, scenes: slice | None = None) -> tuple[np.ndarray, np.ndarray]:
    """On `scenes` of the split, by default those the run was evaluated on.

    `[P, NUM_CROPS]`: 1 where the true image wins against the crop, ties ½; and `[P]`: the number of objects in the scene.
    """
    config = Config.model_validate(yaml.safe_load((run / "config.yaml").read_text()))
    scenes = scenes or slice(0, config.evaluate.limit)
    questions = read_questions(f"builtin:scenes_{split}", scenes.stop)[scenes]
    # A run that trained blind is asked with its eyes open.
    negative = NegativeConfig(kind="crop", variants=NUM_CROPS)
    data = config.data.model_copy(update={"blind": False, "image_negative": negative})
    rows = [
        Row(id=q.id, prompt=q.prompt, images=q.images, chosen=str(q.columns["truth"]), source=q.source)
        for q in questions
    ]
    tuned = config.model.model_copy(update={"lora": None, "adapters": [*config.model.adapters, str(run / "final")]})
    tuned_PI, base_PI = (
        image_scores(load_policy(model, data=data, device="cpu", train=False), rows, data)
        for model in (tuned, config.model.model_copy(update={"lora": None}))
    )
    reward_PI = tuned_PI - base_PI
    num_objects_P = np.array([str(q.columns["truth"]).count(" and ") + 1 for q in questions])
    return (np.sign(reward_PI[:, :1] - reward_PI[:, 1:]) + 1) / 2, num_objects_P


def image_scores(policy: Any, rows: list[Row], data: DataConfig) -> np.ndarray:
    """`[P, 1 + NUM_CROPS]` log-probabilities of each row's caption, with its image and with each crop."""
    # Its own seed: the crops that training saw must not be the ones that are asked about.
    features = make_features(policy, data, None, seed=12345, rows=rows, negatives=True)
    columns = []
    for draw in range(-1, NUM_CROPS):
        values = []
        for start in range(0, len(rows), BATCH):
            some = rows[start : start + BATCH]
            draws = [max(draw, 0)] * len(some)
            contexts = features.contexts(some, draws) if draw < 0 else features.negatives(some, draws)
            requests = [
                Request(context, target, [DrawKey(0, row.id, 0)])
                for context, target, row in zip(contexts, features.targets(some, "chosen", draws), some, strict=True)
            ]
            values.append(policy.score(requests).value_R)
        columns.append(torch.cat(values).double())
    return torch.stack(columns, dim=1).numpy()


def show(name: str, table: dict[str, Any]) -> None:
    for key, row in table.items():
        if isinstance(row, dict):
            low, high = row["interval"]
            value = next(row[k] for k in ("relative_fall", "difference", "share") if k in row)
            means = f"  mean {row['base']:.3f} -> {row['tuned']:.3f}" if "base" in row else ""
            seeds = " ".join(f"{v:.3f}" for v in row["per_seed"])
            print(f"{name:<20} {key:<15} {value:+.3f} [{low:+.3f}, {high:+.3f}]  seeds {seeds}{means}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The image accuracy of finished runs, training seeds of one recipe.")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--split", choices=["dev", "heldout"], default="heldout")
    parser.add_argument("--scenes", nargs=2, type=int, default=[0, 400], metavar=("FIRST", "END"))
    options = parser.parse_args()
    accuracies = image_accuracy(options.runs, options.split, slice(*options.scenes))
    show(options.runs[0].name, accuracies)
