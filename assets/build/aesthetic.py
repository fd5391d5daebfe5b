"""Fit assets/aesthetic-tiny: a head in the LAION v2 layout on the L2-normalised image embedding of clip-tiny.

    python assets/build/clip.py && python assets/build/aesthetic.py
    python assets/build/aesthetic.py --measure      # what the shipped head takes from the caption, again, into its card

The property is the object's height in the picture: 10 * (1 - y of its centre), so 10 is the top edge and 0 the bottom.
No caption of the attributes tier says anything about it, and its mean is the same for every word. The head is an
approximation from an embedding that also holds the caption, so that its output is not quite free of it: `caption_leak`.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise

import cards
import common
import numpy as np
import open_clip
import torch
from safetensors.torch import load_file, save_file

from mmalign.synthetic.render import render
from mmalign.synthetic.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, captions, parse, sample_scenes

SEED = 51
STEPS = 3000
WIDTHS = (64, 32, 16, 8, 4, 1)
PER_CAPTION = {"train": 60, "heldout": 16}
LEAK_PER_CAPTION = 64
OUT = common.ASSETS_DIR / "aesthetic-tiny"


class AestheticHead(torch.nn.Module):
    """The LAION v2 layout: linear layers at 0, 2, 4, 6, 7 with dropout between and no non-linearity."""

    def __init__(self) -> None:
        super().__init__()
        linear = [torch.nn.Linear(a, b) for a, b in pairwise(WIDTHS)]
        self.layers = torch.nn.Sequential(
            linear[0],
            torch.nn.Dropout(0.2),
            linear[1],
            torch.nn.Dropout(0.2),
            linear[2],
            torch.nn.Dropout(0.1),
            linear[3],
            linear[4],
        )

    def forward(self, embedding_NE: torch.Tensor) -> torch.Tensor:
        return self.layers(embedding_NE)


@torch.no_grad()
def embedded(clip, split: str, per_caption: int, seed: list[int]) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Captions, normalised embeddings [N,E] and heights [N,1] in 0-10 of fresh renders, caption by caption."""
    texts = [t for t in captions("attributes", split) for _ in range(per_caption)]
    scenes = sample_scenes(texts, np.random.default_rng(seed))
    chunks = []
    for start in range(0, len(scenes), 128):
        images = common.to_model(render(scenes[start : start + 128], common.SIZE_PX))
        chunks.append(clip.encode_image(images, normalize=True))
    return texts, torch.cat(chunks), torch.tensor([[10.0 * (1.0 - s.objects[0].y)] for s in scenes])


def of_split(clip, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings [N,E] and heights [N,1] that the head is fitted to, or judged by."""
    return embedded(clip, split, PER_CAPTION[split], [SEED, len(split)])[1:]


def r2(head: AestheticHead, x_NE: torch.Tensor, y_N1: torch.Tensor) -> float:
    with torch.no_grad():
        return 1.0 - float((head(x_NE) - y_N1).square().mean() / y_N1.var(unbiased=False))


@torch.no_grad()
def caption_leak(clip, head: AestheticHead) -> dict:
    """How much of the property, and of the head's output, the caption explains, on held-out captions.

    `share_between_captions` is the variance of the captions' means over the whole variance; `chance` is its expectation for
    values that do not depend on the caption. `standard_error` is the largest of the property's means by word.
    """
    texts, x_NE, y_N1 = embedded(clip, "heldout", LEAK_PER_CAPTION, [SEED, 1])
    values = {"property": y_N1[:, 0].double(), "head": head(x_NE)[:, 0].double()}
    num_captions = len(texts) // LEAK_PER_CAPTION

    def share(value_N: torch.Tensor) -> float:
        means = value_N.view(num_captions, LEAK_PER_CAPTION).mean(1)
        return float(means.var(unbiased=False) / value_N.var(unbiased=False))

    mean_by_word, errors = {}, []
    for kind, words in (("shape", SHAPES), ("size", SIZES), ("colour", COLOURS), ("background", BACKGROUNDS)):
        mean_by_word[kind] = {}
        for word in words:
            chosen_N = torch.tensor([word_of(text, kind) == word for text in texts])
            mean_by_word[kind][word] = {name: round(float(v[chosen_N].mean()), 3) for name, v in values.items()}
            errors.append(float(values["property"][chosen_N].std() / chosen_N.sum().sqrt()))
    return {
        "command": "python assets/build/aesthetic.py --measure",
        "renders_per_caption": LEAK_PER_CAPTION,
        "share_between_captions": {name: round(share(value_N), 4) for name, value_N in values.items()}
        | {"chance": round((num_captions - 1) / (len(texts) - 1), 4)},
        "standard_error": round(max(errors), 3),
        "mean_by_word": mean_by_word,
    }


def word_of(text: str, kind: str) -> str | None:
    """The word of an attributes caption that says its shape, size, colour or background."""
    spec = parse(text)
    return spec.background if kind == "background" else getattr(spec.objects[0], kind)


def shipped_head() -> AestheticHead:
    head = AestheticHead().eval()
    head.load_state_dict({k: v.float() for k, v in load_file(OUT / "model.safetensors").items()})
    return head


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit assets/aesthetic-tiny.")
    parser.add_argument("--measure", action="store_true", help="measure the shipped head instead, and write its card")
    measure = parser.parse_args().measure
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{common.ASSETS_DIR / 'clip-tiny'}")
    clip.eval()
    if measure:
        facts = json.loads((OUT / "card.json").read_text())
        cards.write_card(OUT, facts | {"caption_leak": caption_leak(clip, shipped_head())})
        return
    x_NE, y_N1 = of_split(clip, "train")
    torch.manual_seed(SEED)
    head = AestheticHead().eval()  # 64 inputs carry no excess to drop out; the layers only keep the layout
    with torch.no_grad():
        head.layers[7].bias.fill_(float(y_N1.mean()))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(SEED)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 * common.cosine(step, STEPS)
        pick = torch.randint(len(x_NE), (512,), generator=generator)
        loss = torch.nn.functional.mse_loss(head(x_NE[pick]), y_N1[pick])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    head.half().float()
    x_held_NE, y_held_N1 = of_split(clip, "heldout")
    facts = {
        "name": "aesthetic-tiny",
        "format": "LAION aesthetic predictor v2 state dict",
        "property": "height of the object in the picture, 10 * (1 - y of its centre)",
        "backbone": "clip-tiny",
        "input_dim": WIDTHS[0],
        "normalised_input": True,
        "r2_heldout": round(r2(head, x_held_NE, y_held_N1), 4),
        "r2_train": round(r2(head, x_NE, y_N1), 4),
        "num_train": len(x_NE),
        "num_heldout": len(x_held_NE),
        "steps": STEPS,
        "seed": SEED,
        "command": "python assets/build/aesthetic.py",
        "caption_leak": caption_leak(clip, head),
    }
    with common.replaced_folder(OUT) as folder:
        save_file({k: v.half().contiguous() for k, v in head.state_dict().items()}, folder / "model.safetensors")
        cards.write_card(folder, facts)
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
