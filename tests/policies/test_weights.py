"""Identity of weights, settings and tokenizers, and what is said where weights cannot be loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmalign.builtin import builtin_path
from mmalign.config import LoraConfig, ModelConfig
from mmalign.policies.load import load_policy
from mmalign.policies.weights import load_or_explain, tokenizer_settings, weights_checksum


@pytest.fixture
def _own_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_own_threads")
def test_the_checksum_is_that_of_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    state = {str(n): torch.randn(1_600_000, generator=generator) for n in range(8)}
    found = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.add(weights_checksum(state))
    assert len(found) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_the_checksum_sees_one_element_dtype_shape_and_name(dtype):
    tensor = torch.arange(100_000).to(dtype)
    changed = tensor.clone()
    changed[12_345] += 64
    states = [{"a": tensor}, {"a": changed}, {"a": tensor.view(10, -1)}, {"b": tensor}, {"a": tensor.to(torch.int32)}]
    assert len({weights_checksum(state) for state in states}) == len(states)
    assert weights_checksum({"a": tensor, "b": changed}) == weights_checksum({"b": changed, "a": tensor})


def copied(folder: Path, family: str, file: str = "", change: Callable[[Any], object] | None = None) -> Any:
    """The bundled tiny pipeline from `folder`, the content of one of its JSON files changed."""
    shutil.copytree(builtin_path(f"builtin:{family}-tiny"), folder)
    if change is not None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))
    return load_policy(ModelConfig(family=family, path=str(folder)), device="cpu", train=False)


@pytest.mark.parametrize("family", ["sd15", "sd3", "llava"])
def test_encode_keys_depend_neither_on_the_folder_nor_on_what_was_done_before(tmp_path: Path, family: str):
    first, second = copied(tmp_path / "a", family), copied(tmp_path / "b", family)
    tokenizer = second.processor.tokenizer if family == "llava" else second.pipe.tokenizer
    tokenizer(["a red circle"], padding="max_length", truncation=True, max_length=9)
    assert [second.encode_key(kind) for kind in ("prompt", "image")] == [
        *(first.encode_key(kind) for kind in ("prompt", "image"))
    ]
    assert second.reference_fingerprint() == first.reference_fingerprint()


@pytest.mark.parametrize(
    ("family", "file", "change", "changed"),
    [
        ("sd15", "tokenizer/tokenizer.json", lambda c: c["model"]["merges"].clear(), "prompt"),
        ("sd3", "tokenizer_2/tokenizer.json", lambda c: c["model"]["merges"].clear(), "prompt"),
        ("sd15", "tokenizer/tokenizer_config.json", lambda c: c.update(pad_token="<|startoftext|>"), "prompt"),
        ("sd15", "text_encoder/config.json", lambda c: c.update(hidden_act="gelu", id2label={"7": "a"}), "prompt"),
        ("sd15", "vae/config.json", lambda c: c.update(act_fn="gelu"), "image"),
        ("sd3", "vae/config.json", lambda c: c.update(act_fn="gelu"), "image"),
        ("llava", "tokenizer.json", lambda c: c.update(normalizer=None), "prompt"),
        ("llava", "config.json", lambda c: c["vision_config"].update(hidden_act="gelu"), "image"),
        ("llava", "config.json", lambda c: c["text_config"].update(rms_norm_eps=1e-3), "reference"),
    ],
)
def test_a_change_that_no_weight_shows_changes_the_key(tmp_path: Path, family: str, file: str, change, changed: str):
    before = copied(tmp_path / "before", family)
    after = copied(tmp_path / "after", family, file, change)
    same = {kind: before.encode_key(kind) == after.encode_key(kind) for kind in ("prompt", "image")}
    assert same == {kind: kind != changed for kind in ("prompt", "image")}
    if family == "llava" and file == "config.json":
        assert before.reference_fingerprint() != after.reference_fingerprint()


def test_encode_key_follows_the_weights(tmp_path: Path):
    first, second = copied(tmp_path / "a", "sd15"), copied(tmp_path / "b", "sd15")
    assert first.encode_key("image") != first.encode_key("prompt")
    with torch.no_grad():
        next(second.pipe.vae.parameters())[0] += 1e-3
        next(second.pipe.text_encoder.parameters())[0] += 1e-3
    assert all(first.encode_key(kind) != second.encode_key(kind) for kind in ("prompt", "image"))


def test_the_factor_of_a_stacked_adapter_belongs_to_the_base(tmp_path: Path):
    config = ModelConfig(family="sd15", path="builtin:sd15-tiny", lora=LoraConfig(rank=2, alpha=2))
    load_policy(config, device="cpu").export(tmp_path / "first")
    file = tmp_path / "first" / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    settings = json.loads(metadata["lora_adapter_metadata"]) | {"unet.lora_alpha": 16}
    (tmp_path / "second").mkdir()
    metadata["lora_adapter_metadata"] = json.dumps(settings)
    save_file(load_file(file), tmp_path / "second" / file.name, metadata=metadata)
    found = {
        load_policy(
            config.model_copy(update={"lora": None, "adapters": [str(tmp_path / name)]}), device="cpu", train=False
        ).reference_fingerprint()
        for name in ("first", "second")
    }
    assert len(found) == 2


def test_a_tokenizer_without_the_tokenizers_library_is_known_by_its_files(tmp_path: Path):
    from transformers import CTRLTokenizer

    def settings(merges: str) -> dict[str, Any]:
        (tmp_path / "vocab.json").write_text(json.dumps({"re@@": 0, "d</w>": 1, "r@@": 2, "ed</w>": 3, "<unk>": 4}))
        (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
        tokenizer = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
        assert not tokenizer.is_fast
        return tokenizer_settings(tokenizer)

    assert settings("r e") == settings("r e") != settings("e d</w>")


def test_an_unreachable_hub_is_told_from_a_missing_file(tmp_path: Path):
    def miss() -> None:
        raise LocalEntryNotFoundError("offline")

    def hidden() -> None:
        try:
            miss()
        except LocalEntryNotFoundError:
            raise OSError("the file is cut short") from None

    with pytest.raises(ValueError, match=r"not on this disk, and the hub is not reachable .* its cache lacks it"):
        load_or_explain("some/model", miss)
    with pytest.raises(ValueError, match=r": the hub is not reachable .* lacks a file that it refers to"):
        load_or_explain(str(tmp_path), miss)
    with pytest.raises(ValueError, match="the file is cut short"):
        load_or_explain("some/model", hidden)
