"""LAION aesthetic predictor, v1 and v2: a small head on the unit CLIP image embedding.

Published heads (LAION-AI/aesthetic-predictor, christophschuhmann/improved-aesthetic-predictor) load as they are; widths
are read from their tensors, and which layers stand between the linear ones follows from their indices (`LAYOUTS`).

Shape legend: N images, D embedding width.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.builtin import resolve_path

from .clip_model import Dtype, ModelSpec, load_clip, weights_digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL import Image
    from torch import Tensor, nn

# The layers of each published head in order; a number is a dropout rate, so the "linear" ones lie at the indices that
# the keys name. The second has no activation and is one affine map in eval mode.
LAYOUTS: dict[str, tuple[str | float, ...]] = {
    "sa_0_4_vit_l_14_linear (v1)": ("linear",),
    "sac+logos+ava1-l14-linearMSE (v2)": ("linear", 0.2, "linear", 0.2, "linear", 0.1, "linear", "linear"),
    "ava+logos-l14-reluMSE (v2)": (
        *("linear", "relu", 0.2),
        *("linear", "relu", 0.2),
        *("linear", "relu", 0.1),
        *("linear", "relu"),
        "linear",
    ),
}
HEAD_SUFFIXES = (".safetensors", ".pth", ".pt")


class Aesthetic:
    """How pleasant an image looks, whatever its prompt; about 1 to 10, most images 4 to 7. The default is a tiny head
    on the tiny CLIP of the synthetic world.

    For photographs: model [ViT-L-14-quickgelu, openai] and head sac+logos+ava1-l14-linearMSE.pth.

    Args:
        model: CLIP whose image tower the head was trained on; see the clip reward.
        head: head weights, a .safetensors or .pth file (or a folder with one), or `builtin:NAME`.
        dtype: precision of the image tower; the norm and the head are fp32.
        batch_size: images per forward.
    """

    needs_prompt = False
    scale = "mean opinion score"

    def __init__(
        self,
        *,
        model: ModelSpec = "builtin:clip-tiny",
        head: str = "builtin:aesthetic-tiny",
        dtype: Dtype = "fp32",
        batch_size: int = 32,
        device: str = "cpu",
    ) -> None:
        self.clip = load_clip(model, dtype=dtype, device=device)
        state = read_head(resolve_path(head))
        self.head = build_head(state, head).to(device)
        self.range = head_range(self.head)
        self.batch_size = batch_size

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        embedding_ND = self.clip.images(images)
        wanted = next(self.head.parameters()).shape[1]
        if embedding_ND.shape[1] != wanted:
            raise ValueError(
                f"the head reads embeddings of width {wanted}, the CLIP gives {embedding_ND.shape[1]}; "
                "use the CLIP that the head was trained on"
            )
        return self.head(embedding_ND)[:, 0]

    def fingerprint(self) -> str:
        return self.clip.fingerprint() + weights_digest(self.head.state_dict())


def read_head(path: str) -> dict[str, Tensor]:
    """The tensors of a head file, or of the one head file in a folder. Loads tensors only, never code."""
    file = Path(path).expanduser()
    if file.is_dir():
        candidates = sorted(p for p in file.iterdir() if p.suffix in HEAD_SUFFIXES)
        if len(candidates) != 1:
            found = ", ".join(p.name for p in candidates) or "none"
            raise ValueError(
                f"{path}: expected one head file ({', '.join(HEAD_SUFFIXES)}) in the folder, found {found}"
            )
        file = candidates[0]
    if not file.is_file():
        raise ValueError(f"aesthetic head {path!r} does not exist (relative paths start at {Path.cwd()})")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    if file.suffix not in HEAD_SUFFIXES:
        raise ValueError(f"aesthetic head {path!r}: expected a file that ends in {', '.join(HEAD_SUFFIXES)}")
    import torch

    # The published files were saved on a GPU.
    return torch.load(file, map_location="cpu", weights_only=True)


def build_head(state: Mapping[str, Tensor], source: str) -> nn.Sequential:
    """The head in eval mode, fp32, its layout and widths read from `state`; every key must be used.

    Raises `ValueError` naming `source`, the keys found and the layouts known.
    """
    from torch import nn

    layout = next((layout for layout in LAYOUTS.values() if _keys(layout) == set(state)), None)
    if layout is None:
        known = "; ".join(
            f"{name}: {', '.join(sorted(_prefixes(layout).values()))}" for name, layout in LAYOUTS.items()
        )
        raise ValueError(
            f"{source}: not a LAION aesthetic head; its keys are {', '.join(sorted(state)[:12])}. "
            f"Known are weight and bias below: {known}"
        )
    prefixes = _prefixes(layout)
    shapes = [list(state[f"{prefix}weight"].shape) for prefix in prefixes.values()]
    chained = all(len(shape) == 2 for shape in shapes) and all(a[0] == b[1] for a, b in pairwise(shapes))
    if not chained or shapes[-1][0] != 1:
        raise ValueError(f"{source}: the layers do not chain to one output; weight shapes {shapes}")
    layers: list[nn.Module] = []
    for index, kind in enumerate(layout):
        if kind == "linear":
            num_out, num_in = state[f"{prefixes[index]}weight"].shape
            layers.append(nn.Linear(num_in, num_out))
        else:
            layers.append(nn.ReLU() if kind == "relu" else nn.Dropout(float(kind)))
    head = nn.Sequential(*layers)
    head.load_state_dict(
        {f"{index}.{part}": state[prefix + part] for index, prefix in prefixes.items() for part in ("weight", "bias")}
    )
    return head.float().eval().requires_grad_(False)


def _prefixes(layout: Sequence[str | float]) -> dict[int, str]:
    """Index of each linear layer -> what its keys start with in the published file."""
    return {i: f"layers.{i}." if len(layout) > 1 else "" for i, kind in enumerate(layout) if kind == "linear"}


def _keys(layout: Sequence[str | float]) -> set[str]:
    return {prefix + part for prefix in _prefixes(layout).values() for part in ("weight", "bias")}


def affine(head: nn.Sequential) -> tuple[Tensor, Tensor] | None:
    """(weight [D], bias []) in fp64 of a head without activations, which is one affine map; None with activations."""
    import torch
    from torch import nn

    if any(isinstance(layer, nn.ReLU) for layer in head):
        return None
    width = next(head.parameters()).shape[1]
    weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for layer in head:
        if isinstance(layer, nn.Linear):
            bias = layer.weight.cpu().double() @ bias + layer.bias.cpu().double()
            weight = layer.weight.cpu().double() @ weight
    return weight[0], bias[0]


def head_range(head: nn.Sequential) -> tuple[float, float] | None:
    """What a unit embedding can score at all: bias ± ‖weight‖ of the affine map; None for a head with activations."""
    collapsed = affine(head)
    if collapsed is None:
        return None
    weight, bias = collapsed
    norm = float(weight.norm())
    # fp32 evaluation may step over the edge by rounding.
    slack = 1e-4 * max(1.0, norm)
    return float(bias) - norm - slack, float(bias) + norm + slack
