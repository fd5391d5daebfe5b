"""Write assets/prompts/TIER_SPLIT.txt, one caption per line, from the scene specification.

python assets/build/prompts.py
"""

from __future__ import annotations

import common

from mmalign.synthetic.scenes import SPLITS, TIERS, captions


def main() -> None:
    folder = common.ASSETS_DIR / "prompts"
    folder.mkdir(exist_ok=True)
    for tier in TIERS:
        for split in SPLITS:
            path = folder / f"{tier}_{split}.txt"
            path.write_text("\n".join(captions(tier, split)) + "\n")
            print(f"{path.name}: {len(captions(tier, split))} captions")


if __name__ == "__main__":
    main()
