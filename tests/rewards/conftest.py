"""Images with prompts, a way to write a user's reward file, and two tiny CLIPs with random weights."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

CONTEXT_LENGTH = 12


class World(NamedTuple):
    images: list[Image.Image]
    prompts: list[str]


@pytest.fixture(scope="session")
def world() -> World:
    """Seven renders of the synthetic world with their captions."""
    from mmalign.synthetic.render import render
    from mmalign.synthetic.scenes import captions, sample_scenes

    prompts = [*captions("attributes", "train")[:5], *captions("relations", "train")[:2]]
    pixels_NHWC = render(sample_scenes(prompts, np.random.default_rng(0)), 64)
    return World([Image.fromarray(pixels_HWC) for pixels_HWC in pixels_NHWC], prompts)


@pytest.fixture
def reward_file(tmp_path: Path) -> Callable[[str, str], str]:
    """Write a user's `my_reward.py` and return its path."""

    def write(source: str, name: str = "my_reward.py") -> str:
        path = tmp_path / name
        path.write_text("import numpy as np\n" + textwrap.dedent(source), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import CLIPTokenizer

    from mmalign.synthetic.scenes import captions

    made = CLIPTokenizer().train_new_from_iterator(captions("attributes", "train"), vocab_size=400)
    made.model_max_length = CONTEXT_LENGTH
    return made


@pytest.fixture(scope="session")
def transformers_clip(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real CLIPModel folder: random weights, width 24, 32 px."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("transformers-clip")
    common = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config={**common, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT_LENGTH},
        vision_config={**common, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    # The default initialisation is so small that all embeddings nearly agree.
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def open_clip_config(tokenizer: Any) -> dict[str, Any]:
    return {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
            "text_cfg": {
                "context_length": CONTEXT_LENGTH,
                "vocab_size": len(tokenizer),
                "hf_tokenizer_name": "tiny",
                "width": 32,
                "heads": 2,
                "layers": 2,
                "pool_type": "eos",
                "eos_id": tokenizer.eos_token_id,
            },
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
    }


@pytest.fixture(scope="session")
def open_clip_folder(
    tokenizer: Any, open_clip_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A real open_clip folder as `local-dir:` wants it, random weights."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("open-clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(**open_clip_config["model_cfg"])
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _keep_loaded(transformers_clip: Path, open_clip_folder: Path) -> list[Any]:
    """Loaded models are shared while in use; held here, they are loaded once for all tests."""
    from mmalign.rewards.clip_model import load_clip

    return [load_clip(model) for model in (str(transformers_clip), str(open_clip_folder), "builtin:clip-tiny")]
