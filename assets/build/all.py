"""Build every shipped asset, in order; `make assets` runs this. Resumes where a killed run stopped.

    python assets/build/all.py

One thread and about two hours on a laptop CPU. Delete assets/build/.work to start over.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ORDER = ("prompts", "vae", "clip", "aesthetic", "sdxl", "sdxl_pairs", "sd15", "sd3", "llava", "llava_pairs")


def main() -> None:
    started = time.monotonic()
    for number, name in enumerate(ORDER, start=1):
        print(f"[{number}/{len(ORDER)}] {name} ({(time.monotonic() - started) / 60:.1f} min so far)", flush=True)
        # A process each: a script that fails leaves the others' results in place.
        subprocess.run([sys.executable, str(Path(__file__).with_name(f"{name}.py"))], check=True)
    print(f"done in {(time.monotonic() - started) / 60:.1f} min")


if __name__ == "__main__":
    main()
