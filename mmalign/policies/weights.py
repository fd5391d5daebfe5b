"""Loading of weights, with errors that say what to do, and their identity."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor, nn

T = TypeVar("T")
GIVE = "Give a local folder, a hub id, or builtin:NAME"
PUT_BACK = "Full fine-tuning loads the base again, as the reference it is compared with: put it back as it was"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_or_explain(path: str, load: Callable[[], T], fix: str = GIVE) -> T:
    """Run a hub or disk loader; turn its many failures into one line that names the path and ends with `fix`."""
    try:
        return load()
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())[:400].rstrip(".")
        # The loaders then speak of a missing file or of the network, or not of the path at all.
        if _caused_by(error, HFValidationError) and not Path(path).exists():
            text = "it is not on this disk, and no hub id is written like this"
        elif _caused_by(error, LocalEntryNotFoundError):
            lacks = "a file that it refers to" if Path(path).exists() else "it"
            where = "" if Path(path).exists() else "it is not on this disk, and "
            text = f"{where}the hub is not reachable (or HF_HUB_OFFLINE is set) and its cache lacks {lacks}"
        raise ValueError(f"cannot load {path!r}: {text}. {fix}") from error


def _caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error is not None


def weights_hash(modules: dict[str, nn.Module], salt: str) -> str:
    """Hash of all weights and of the factors of adapters: the cache must notice another VAE behind the same path."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    digest = hashlib.blake2b(salt.encode(), digest_size=12)
    for role, module in modules.items():
        for name, tensor in module.state_dict().items():
            digest.update(f"{role}.{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        for name, layer in module.named_modules():
            if isinstance(layer, BaseTunerLayer):
                digest.update(f"{role}.{name}:{getattr(layer, 'scaling', None)}".encode())
    return digest.hexdigest()


def stored_settings(part: Any) -> dict[str, Any]:
    """What the config file of a component says: without its path, version and dtype, and what diffusers fills in.

    transformers fills in what its class adds; a new version may therefore give other settings for the same file.
    """
    if hasattr(part.config, "to_diff_dict"):  # of transformers
        return _without_noise(part.config.to_diff_dict())
    filled_in = part.config.get("_use_default_values", ())
    return {key: value for key, value in part.config.items() if not key.startswith("_") and key not in filled_in}


def _without_noise(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        str(key): _without_noise(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if not str(key).startswith("_") and key not in ("transformers_version", "architectures", "dtype")
    }


def tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """What decides the ids of a text: merges and normalisation with the vocabulary, limit, padding, special tokens; of a
    slow tokenizer its files.

    Truncation and padding that a call left behind do not count.
    """
    names = ("model_max_length", "padding_side", "truncation_side", "split_special_tokens", "special_tokens_map")
    settings = {"class": type(tokenizer).__name__, **{name: getattr(tokenizer, name) for name in names}}
    if tokenizer.is_fast:
        pipeline = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        return {**settings, "pipeline": pipeline}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(file).read_bytes() for file in tokenizer.save_vocabulary(folder)]
    return {**settings, "added": tokenizer.get_added_vocab(), "files": [hashlib.blake2b(f).hexdigest() for f in files]}


def weights_checksum(state: Mapping[str, Tensor]) -> str:
    """Identity of weights, in one pass where they are: names, shapes, dtypes, and each tensor's strided probe and sum.

    The sum is of the bits, as integers: equal for every order of adding up, hence for every device and thread count.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        flat = tensor.detach().reshape(-1)
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if flat.numel() and not tensor.is_meta:
            bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
            digest.update(bits[:: max(1, flat.numel() // 256)][:256].cpu().numpy().tobytes())
            digest.update(str(bits.sum(dtype=torch.int64).item()).encode())
    return digest.hexdigest()


def same_weights(original: nn.Module, loaded: nn.Module) -> bool:
    """Whether `original`, rounded to the dtypes of `loaded`, is equal to it to the last bit."""
    first, second = original.state_dict(), loaded.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name].to(tensor.dtype), tensor.cpu()) for name, tensor in second.items()
    )
