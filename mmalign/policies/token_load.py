"""Processor, model and adapters of an image-text-to-text policy, from disk or hub and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmalign import attention
from mmalign.builtin import resolve_path
from mmalign.config import ModelConfig
from mmalign.policies.weights import GIVE, load_or_explain


def load_processor(config: ModelConfig, model_type: str) -> Any:
    """The stock processor. Raises `ValueError` when the checkpoint holds another kind of model or lacks a part."""
    from transformers import AutoConfig, AutoProcessor

    path, revision = resolve_path(config.path), config.revision
    found: Any = load_or_explain(config.path, lambda: AutoConfig.from_pretrained(path, revision=revision))
    if found.model_type != model_type:
        raise ValueError(
            f"model.path {config.path!r} holds a {found.model_type!r} model, but model.family {config.family!r} needs "
            f"{model_type!r}. Change one of the two"
        )
    processor: Any = load_or_explain(config.path, lambda: AutoProcessor.from_pretrained(path, revision=revision))
    missing = [part for part in ("image_processor", "tokenizer") if getattr(processor, part, None) is None]
    if missing:
        raise ValueError(
            f"model.path {config.path!r} has no {' and no '.join(missing)}: copy preprocessor_config.json, "
            f"processor_config.json and the tokenizer files beside the weights"
        )
    return processor


def load_model(config: ModelConfig, dtype: torch.dtype, backend: str, fix: str = GIVE) -> Any:
    """The stock model, its weights in `dtype`. Raises `ValueError` that ends with `fix`."""
    from transformers import AutoModelForImageTextToText

    options: dict[str, Any] = {"revision": config.revision, "variant": config.variant, "dtype": dtype}
    options["attn_implementation"] = "flash_attention_2" if backend == "flash" else "sdpa"
    path = resolve_path(config.path)

    def load() -> Any:
        return AutoModelForImageTextToText.from_pretrained(path, **options)

    return load_or_explain(config.path, load, fix)


def load_adapters(model: Any, paths: Sequence[str]) -> list[str]:
    """Load PEFT adapter folders into the model; the names they got."""
    names = []
    for index, path in enumerate(paths):
        name = f"stacked_{index}"
        load_or_explain(path, lambda p=path, n=name: model.load_adapter(p, adapter_name=n))  # type: ignore[misc]
        names.append(name)
    return names


def save_adapter(model: Any, name: str, folder: Path, *, base: str) -> None:
    """Write one adapter in PEFT's format. transformers' `save_pretrained` refuses while several are active."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model, adapter_name=name)
    tensors = {f"base_model.model.{key}": tensor.cpu().contiguous() for key, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = model.peft_config[name]
    settings.base_model_name_or_path = base
    settings.save_pretrained(folder)


def select_attention(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """`sdpa` or `flash`. Raises `ValueError` when an explicit request cannot run."""
    if requested == "xformers":
        raise ValueError(
            "model.attention = 'xformers': language models in transformers have no xformers kernel; use `auto` or `sdpa`"
        )
    if requested != "flash":
        return "sdpa"
    from transformers.utils import is_flash_attn_2_available

    attention.select("flash", device, dtype)
    if not is_flash_attn_2_available():
        raise ValueError(
            "model.attention = 'flash': language models need the flash-attn package, which is not installed; use `auto` "
            "or `sdpa`"
        )
    return "flash"


def why_not_shared(text_config: Any, backend: str, max_length: int) -> str | None:
    """Why a row of several responses, with a mask of our own, would compute something else; None if it is exact."""
    if backend == "flash":
        return "flash attention takes no mask of ours"
    unknown = set(getattr(text_config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        return f"the model has layers of type {', '.join(sorted(unknown))}"
    window = getattr(text_config, "sliding_window", None) if getattr(text_config, "use_sliding_window", True) else None
    # Within the window a sliding layer is a full one; positions, unlike columns, never exceed max_length.
    if window is not None and window < max_length:
        return f"the model's attention window of {window} tokens is shorter than data.max_length = {max_length}"
    return None
