"""The LAION aesthetic head: published keys, one affine map, unit embeddings, eval mode."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mmalign.config import RewardConfig
from mmalign.reward import load_reward
from mmalign.rewards.aesthetic import LAYOUTS, affine, build_head, head_range, read_head
from mmalign.rewards.clip_model import load_clip

LINEAR, RELU = (0, 2, 4, 6, 7), (0, 3, 6, 9, 11)


@pytest.fixture(scope="module")
def published(root: Path) -> Path:
    path = root.parent / "shared" / "data" / "sac+logos+ava1-l14-linearMSE.pth"
    if not path.is_file():
        pytest.skip(f"the published head {path.name} is not here")
    return path


def head_state(indices: tuple[int, ...], widths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for index, (into, out) in zip(indices, pairwise(widths), strict=True):
        state[f"layers.{index}.weight"] = torch.randn(out, into, generator=generator)
        state[f"layers.{index}.bias"] = torch.randn(out, generator=generator)
    return state


def unit(num: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    embedding = torch.randn(num, width, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return nn.functional.normalize(embedding, dim=-1)


# --- the published file -----------------------------------------------------------------------------------------------


def test_published_head_is_the_known_affine_map(published: Path):
    head = build_head(read_head(str(published)), published.name)
    collapsed = affine(head)
    assert collapsed is not None
    weight, bias = collapsed
    assert weight.norm().item() == pytest.approx(17.9956, abs=1e-4)
    assert bias.item() == pytest.approx(5.23665, abs=1e-5)
    embedding_ND = unit(64, 768, torch.float64)
    expected_N = embedding_ND @ weight + bias
    with torch.no_grad():
        torch.testing.assert_close(head.double()(embedding_ND)[:, 0], expected_N, atol=1e-12, rtol=0)
        torch.testing.assert_close(head.float()(embedding_ND.float())[:, 0].double(), expected_N, atol=1e-4, rtol=0)


def test_published_head_range(published: Path):
    low, high = head_range(build_head(read_head(str(published)), published.name))
    assert (low, high) == pytest.approx((-12.76, 23.23), abs=0.01)


def test_published_head_refuses_a_clip_of_another_width(published: Path, world):
    scorer = load_reward(RewardConfig(name="aesthetic", head=str(published)))
    with pytest.raises(ValueError, match="reads embeddings of width 768, the CLIP gives 64"):
        scorer.score(world.images)


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(768, 1024, 128, 64, 16, 1), (64, 32, 16, 8, 4, 1)])
def test_linear_layout_is_affine_and_has_no_dropout_in_use(widths: tuple[int, ...]):
    state = head_state(LINEAR, widths)
    head = build_head(state, "here")
    assert not head.training
    embedding_ND = unit(8, widths[0])
    x = embedding_ND
    for index in LINEAR:
        x = x @ state[f"layers.{index}.weight"].T + state[f"layers.{index}.bias"]
    torch.testing.assert_close(head(embedding_ND), x, rtol=1e-4, atol=1e-3)
    assert torch.equal(head(embedding_ND), head(embedding_ND))


def test_relu_layout_puts_an_activation_between_and_declares_no_range():
    state = head_state(RELU, (64, 32, 16, 8, 4, 1))
    head = build_head(state, "here")
    embedding_ND = unit(8, 64)
    x = embedding_ND
    for index in RELU:
        x = x @ state[f"layers.{index}.weight"].T + state[f"layers.{index}.bias"]
        x = x if index == RELU[-1] else x.relu()
    torch.testing.assert_close(head(embedding_ND), x, rtol=1e-4, atol=1e-3)
    assert affine(head) is None
    assert head_range(head) is None


def test_v1_layout_is_one_linear_layer():
    state = {"weight": torch.randn(1, 32, generator=torch.Generator().manual_seed(0)), "bias": torch.tensor([3.53])}
    head = build_head(state, "here")
    torch.testing.assert_close(head(unit(4, 32))[:, 0], unit(4, 32) @ state["weight"][0] + 3.53)
    assert len(LAYOUTS) == 3


def test_range_is_reached_by_the_embedding_along_the_weight():
    head = build_head(head_state(LINEAR, (8, 7, 6, 5, 4, 1)), "here")
    weight, bias = affine(head)
    low, high = head_range(head)
    best = head((weight / weight.norm()).float()[None]).item()
    assert low <= best <= high
    assert best == pytest.approx(float(bias + weight.norm()), rel=1e-4)


@pytest.mark.parametrize("change", ["drop", "add", "rename"])
def test_keys_are_strict(change: str):
    state = head_state(LINEAR, (8, 7, 6, 5, 4, 1))
    if change != "add":
        value = state.pop("layers.6.bias")
    if change != "drop":
        state["layers.8.bias"] = value if change == "rename" else torch.zeros(1)
    with pytest.raises(ValueError, match="here: not a LAION aesthetic head; its keys are layers"):
        build_head(state, "here")


@pytest.mark.parametrize("widths", [(8, 7, 6, 5, 4, 2), (8, 7, 6, 5, 4, 1)])
def test_layers_must_chain_to_one_output(widths: tuple[int, ...]):
    state = head_state(LINEAR, widths)
    if widths[-1] == 1:
        state["layers.2.weight"] = torch.zeros(6, 9)
    with pytest.raises(ValueError, match="do not chain to one output"):
        build_head(state, "here")


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_head_file_or_the_folder_that_holds_it(tmp_path: Path, suffix: str):
    state = head_state(LINEAR, (8, 7, 6, 5, 4, 1))
    path = tmp_path / f"head{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    for spec in (path, tmp_path):
        loaded = read_head(str(spec))
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_missing_ambiguous_and_foreign_files_are_errors(tmp_path: Path):
    with pytest.raises(ValueError, match=r"expected one head file .* found none"):
        read_head(str(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        read_head(str(tmp_path / "head.pth"))
    (tmp_path / "head.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="expected a file that ends in"):
        read_head(str(tmp_path / "head.bin"))
    for name in ("a.pth", "b.pth"):
        torch.save({}, tmp_path / name)
    with pytest.raises(ValueError, match=r"found a\.pth, b\.pth"):
        read_head(str(tmp_path))


def test_head_file_cannot_run_code(tmp_path: Path):
    """A pickle that would create a file when loaded is refused, and the file is not there."""
    trace = tmp_path / "trace"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (trace,))

    torch.save({"weight": Evil()}, tmp_path / "head.pth")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        read_head(str(tmp_path / "head.pth"))
    assert not trace.exists()


# --- the reward -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path, open_clip_folder: Path) -> RewardConfig:
    save_file(head_state(LINEAR, (16, 12, 8, 6, 4, 1)), tmp_path / "head.safetensors")
    return RewardConfig(name="aesthetic", model=str(open_clip_folder), head=str(tmp_path))


def test_score_is_the_head_on_the_unit_embedding_whatever_the_prompt(tiny: RewardConfig, world):
    scorer = load_reward(tiny)
    clip = load_clip(tiny.options()["model"])
    weight, bias = affine(scorer.reward.head)
    expected = clip.images(world.images).double() @ weight + bias
    scores = scorer.score(*world).scores
    torch.testing.assert_close(scores.double(), expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(scores, scorer.score(world.images).scores)
    assert scorer.needs_prompt is False
    assert scorer.range[0] <= scores.min()
    assert scores.max() <= scorer.range[1]


@pytest.mark.parametrize("size", [1, 2, 7])
def test_batch_equals_singles(tiny: RewardConfig, world, size: int):
    scorer = load_reward(tiny.model_copy(update={"batch_size": size}))
    singles = torch.cat([scorer.score([image]).scores for image in world.images])
    assert singles.shape == (7,)
    torch.testing.assert_close(scorer.score(world.images).scores, singles, atol=1e-5, rtol=1e-5)


def test_fingerprint_follows_the_weights_not_the_place(tiny: RewardConfig, tmp_path: Path):
    first = load_reward(tiny).reward.fingerprint()
    state = head_state(LINEAR, (16, 12, 8, 6, 4, 1))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    save_file(state, moved / "other.safetensors")
    assert load_reward(tiny.model_copy(update={"head": str(moved)})).reward.fingerprint() == first
    state["layers.7.bias"] += 1
    save_file(state, moved / "other.safetensors")
    assert load_reward(tiny.model_copy(update={"head": str(moved)})).reward.fingerprint() != first


def test_bundled_head(world):
    scorer = load_reward("aesthetic")
    scores = scorer.score(world.images).scores
    assert torch.isfinite(scores).all()
    assert scores.unique().numel() > 1
