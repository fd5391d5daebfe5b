"""All benchmarks in one table.

    python bench/run.py [--quick] [--size sdxl] [--save [FILE]]

Ratios are between procedures that ran in turns in this process; times of different machines are not compared.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cache
import diffusers
import overhead
import tokens
import torch
from side_by_side import chosen_size, chosen_variants, parser, print_results, workplace

from mmalign.run.atomic import write_json

FOLDER = Path(__file__).resolve().parent


def conditions(size: str) -> dict[str, Any]:
    """What a ratio depends on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "size": size,
    }


def commit() -> str:
    """Short hash of the checkout, `+` when files differ from it; `unknown` outside of a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=FOLDER, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    default = FOLDER / "results.json"
    options.add_argument("--save", type=Path, nargs="?", const=default, help=f"also write JSON (bench/{default.name})")
    chosen = options.parse_args()
    size, variants = chosen_size(chosen), chosen_variants(chosen)
    known = conditions(size.name)
    with workplace(size) as folder:
        results = overhead.measure(size, folder, variants) + cache.measure(size, folder, variants)
        of_tokens, remarks = tokens.measure(size, folder) if "lora" in variants else ([], [])
    notes = [] if size.name == "quick" else cache.predictions()
    results += of_tokens
    print_results(results, ", ".join(f"{key} {value}" for key, value in known.items()), notes + remarks)
    if chosen.save is not None:
        lines = [dataclasses.asdict(result) | {"verdict": result.verdict} for result in results]
        write_json(chosen.save, {"conditions": known, "results": lines, "predictions": notes, "remarks": remarks})


if __name__ == "__main__":
    main()
