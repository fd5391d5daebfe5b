"""Both towers of a CLIP, from open_clip or transformers: RGB images and prompts to unit embeddings in fp32.

Shape legend: N images or prompts, L tokens, D embedding width, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakValueDictionary

from mmalign.builtin import resolve_path
from mmalign.registry import nearest

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn

Dtype = Literal["fp32", "bf16", "fp16"]
ModelSpec = str | tuple[str, str]
FIX = "Give a local folder, a hub id (hf-hub:ID for one in open_clip's format), or builtin:NAME"

# CLIP score and the aesthetic head of one run share the towers they have in common.
_loaded: WeakValueDictionary[tuple[Any, ...], ClipModel] = WeakValueDictionary()


@dataclass(eq=False)
class ClipModel:
    """A frozen CLIP in eval mode. `images` and `texts` return unit embeddings [N, D], fp32, on `device`."""

    module: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    tokenize: Callable[[list[str]], Tensor]
    encode_image: Callable[[Tensor], Any]
    encode_text: Callable[[Tensor], Any]
    eos_token_id: int | None
    device: str
    dtype: torch.dtype

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        import torch

        pixels_NCHW = torch.stack([self.preprocess(image) for image in images]).to(self.device, self.dtype)
        return _unit(self.encode_image(pixels_NCHW))

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Longer prompts are cut at the context length with the end token kept."""
        unique = list(dict.fromkeys(prompts))
        ids_NL = self.tokenize(unique)
        if self.eos_token_id is not None and not (ids_NL == self.eos_token_id).any(dim=1).all():
            raise ValueError(
                f"the tokenizer adds no end token ({self.eos_token_id}), where CLIP reads the text embedding; "
                "use the tokenizer that belongs to the model"
            )
        embedding_ND = _unit(self.encode_text(ids_NL.to(self.device)))
        position = {prompt: n for n, prompt in enumerate(unique)}
        return embedding_ND[[position[prompt] for prompt in prompts]]

    def fingerprint(self) -> str:
        return weights_digest(self.module.state_dict())


def load_clip(model: ModelSpec, *, dtype: Dtype = "fp32", device: str = "cpu") -> ClipModel:
    """Load a CLIP in eval mode with frozen weights; equal arguments share one copy while it is in use.

    Args:
        model: `builtin:NAME`; a folder or hub id in transformers format (`openai/clip-vit-large-patch14`,
            `yuvalkirstain/PickScore_v1`); an open_clip folder, `local-dir:FOLDER` or `hf-hub:ID`; or a pair
            (architecture, pretrained tag or file) of open_clip.
        dtype: precision of the towers. Norms and everything after them are fp32.

    Raises `ValueError` naming the model where it is no CLIP, lacks weights, or reads text at the wrong position.
    """
    key = (model, dtype, device)
    found = _loaded.get(key)
    if found is None:
        import torch

        precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        found = _open(model, precision, device)
        found.module.to(device, precision).eval().requires_grad_(False)
        _loaded[key] = found
    return found


def embedding(output: Any) -> Tensor:
    """The projected embedding in what a tower returned: a tensor (open_clip, transformers 4) or an output object whose
    `pooler_output` is the projection (transformers 5)."""
    import torch

    found = output if isinstance(output, torch.Tensor) else getattr(output, "pooler_output", None)
    if not isinstance(found, torch.Tensor) or found.ndim != 2:
        raise ValueError(f"no embedding [N, D] in the CLIP tower's {type(output).__name__}")
    return found


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Identity of weights: names, shapes and up to 256 evenly spaced values of each tensor (a full hash of a CLIP-H
    would take longer than scoring a grid)."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        values = state[name].detach().flatten()
        sample = values[:: max(1, values.numel() // 256)].to("cpu", torch.float64)
        digest.update(f"{name}{list(state[name].shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _unit(output: Any) -> Tensor:
    import torch.nn.functional as F

    return F.normalize(embedding(output).float(), dim=-1)


def _open(model: ModelSpec, dtype: torch.dtype, device: str) -> ClipModel:
    if not isinstance(model, str):
        architecture, pretrained = model
        return _open_clip(architecture, pretrained, dtype, device)
    if model.startswith(("hf-hub:", "local-dir:")):
        return _open_clip(model, None, dtype, device)
    path = resolve_path(model)
    if Path(path).is_dir():
        if (Path(path) / "open_clip_config.json").is_file():
            return _open_clip(f"local-dir:{path}", None, dtype, device)
        if not (Path(path) / "config.json").is_file():
            raise ValueError(
                f"CLIP folder {path!r} holds neither open_clip_config.json (open_clip) nor config.json (transformers)"
            )
    return _transformers(path, dtype, device)


def _open_clip(name: str, pretrained: str | None, dtype: torch.dtype, device: str) -> ClipModel:
    import open_clip

    from mmalign.policies.weights import load_or_explain

    if pretrained is not None:
        known = open_clip.list_models()
        if name not in known:
            raise ValueError(f"open_clip knows no architecture {name!r}{nearest(name, known)}")
        wants = bool(open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu"))
        if pretrained in open_clip.list_pretrained_tags_by_model(name):
            has = bool((open_clip.get_model_config(name) or {}).get("quick_gelu"))
            if has != wants:
                fix = f"{name}-quickgelu" if wants else name.removesuffix("-quickgelu")
                raise ValueError(
                    f"the weights {pretrained!r} of {name!r} were trained {'with' if wants else 'without'} QuickGELU; "
                    f"use the architecture {fix!r}"
                )
    model = f"{name} with {pretrained}" if pretrained else name.removeprefix("local-dir:")
    module, preprocess = load_or_explain(
        model, lambda: open_clip.create_model_from_pretrained(name, pretrained, weights_only=True), FIX
    )
    tokenizer: Any = load_or_explain(model, lambda: open_clip.get_tokenizer(name), FIX)
    text = getattr(module, "text", module)
    pool = getattr(module, "text_pool_type", getattr(text, "pool_type", None))
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is None:
        vocab_size = getattr(module, "vocab_size", None)
        if vocab_size is not None and vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"{name}: open_clip fell back to its own tokenizer of {tokenizer.vocab_size} tokens, the model has "
                f"{vocab_size}; name the folder's tokenizer in text_cfg.hf_tokenizer_name"
            )
        eos = tokenizer.eot_token_id
    else:
        eos = inner.eos_token_id
        if pool == "argmax" and eos != max(inner.get_vocab().values()):
            raise ValueError(_misplaced(name, eos, "the highest token id (text_cfg.pool_type argmax)"))
        pooled_at = getattr(module, "text_eos_id", getattr(text, "eos_id", None))
        if pool == "eos" and eos != pooled_at:
            raise ValueError(_misplaced(name, eos, f"token {pooled_at} (text_cfg.eos_id)"))
    return ClipModel(
        module=module,
        preprocess=preprocess,
        tokenize=tokenizer,
        encode_image=module.encode_image,
        encode_text=module.encode_text,
        eos_token_id=eos if pool in ("argmax", "eos") else None,
        device=device,
        dtype=dtype,
    )


def _transformers(path: str, dtype: torch.dtype, device: str) -> ClipModel:
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

    from mmalign.policies.weights import load_or_explain

    config = load_or_explain(path, lambda: AutoConfig.from_pretrained(path), FIX)
    if config.model_type != "clip":
        raise ValueError(f"{path!r} is a {config.model_type!r} model, expected a CLIPModel (model_type 'clip')")
    loaded: Any = load_or_explain(
        path, lambda: CLIPModel.from_pretrained(path, output_loading_info=True, dtype=dtype), FIX
    )
    module, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{path!r} lacks {len(missing)} of CLIPModel's weights, e.g. {missing[0]!r}")
    tokenizer: Any = load_or_explain(path, lambda: AutoTokenizer.from_pretrained(path), FIX)
    processor: Any = load_or_explain(path, lambda: AutoImageProcessor.from_pretrained(path), FIX)
    eos, pooled_at = tokenizer.eos_token_id, config.text_config.eos_token_id
    # 2 is what configs older than transformers 4.31 hold; the text tower then pools at the highest id.
    highest = max(tokenizer.get_vocab().values())
    if eos != (highest if pooled_at == 2 else pooled_at):
        where = "the highest token id (text_config.eos_token_id 2)" if pooled_at == 2 else f"token {pooled_at}"
        raise ValueError(_misplaced(path, eos, where))
    length = config.text_config.max_position_embeddings

    def tokenize(prompts: list[str]) -> Tensor:
        # Fixed length: no prompt's embedding depends on its neighbours. Causal attention never sees the padding.
        encoded = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return encoded.input_ids

    def preprocess(image: Image.Image) -> Tensor:
        return processor(images=image, return_tensors="pt").pixel_values[0]

    return ClipModel(
        module=module,
        preprocess=preprocess,
        tokenize=tokenize,
        encode_image=module.get_image_features,
        encode_text=module.get_text_features,
        eos_token_id=eos,
        device=device,
        dtype=dtype,
    )


def _misplaced(name: str, eos: int | None, where: str) -> str:
    return (
        f"{name}: the text tower reads its embedding at {where}, but the tokenizer ends prompts with token {eos}; "
        "all prompts would look alike or be read mid-way. Fix the ids in the model's config"
    )
