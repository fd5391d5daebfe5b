"""What the build scripts share: stateless training batches, kill-safe checkpoints, progress lines.

Shapes: B batch, C channels, H = W = SIZE_PX.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Two builds share a small machine best with one thread each; set before torch starts its pool.
os.environ.setdefault("OMP_NUM_THREADS", "1")

BUILD_DIR = Path(__file__).resolve().parent
ASSETS_DIR = BUILD_DIR.parent
WORK_DIR = BUILD_DIR / ".work"
if str(ASSETS_DIR.parent) not in sys.path:
    sys.path.insert(0, str(ASSETS_DIR.parent))
# xformers prints a warning of six lines in every process that imports a diffusers model.
logging.getLogger("xformers").setLevel(logging.ERROR)

import numpy as np  # noqa: E402
import torch  # noqa: E402

from mmalign.synthetic.render import render  # noqa: E402
from mmalign.synthetic.scenes import captions, sample_scenes  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

SIZE_PX = 64


def to_model(image_BHWC: np.ndarray) -> torch.Tensor:
    """uint8 [B,H,W,3] to float32 [B,3,H,W] in [-1, 1]."""
    return torch.from_numpy(image_BHWC).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_uint8(image_BCHW: torch.Tensor) -> np.ndarray:
    """float [B,3,H,W] in [-1, 1] to uint8 [B,H,W,3]."""
    image_BCHW = ((image_BCHW.float().clamp(-1, 1) + 1.0) * 127.5).round()
    return image_BCHW.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def train_batch(seed: int, step: int, batch_size: int, relations_share: float) -> tuple[list[str], np.ndarray]:
    """Captions of the train split and fresh renders of them, a function of (seed, step) alone."""
    rng = np.random.default_rng([seed, step])
    num_relations = int(rng.binomial(batch_size, relations_share))
    texts = [str(t) for t in rng.choice(captions("attributes", "train"), batch_size - num_relations)]
    texts += [str(t) for t in rng.choice(captions("relations", "train"), num_relations)]
    return texts, render(sample_scenes(texts, rng), SIZE_PX)


def renders_of(texts: list[str], seed: int, per_caption: int = 1) -> tuple[list[str], np.ndarray]:
    """`per_caption` fresh renders of each caption, and the repeated captions."""
    repeated = [t for t in texts for _ in range(per_caption)]
    return repeated, render(sample_scenes(repeated, np.random.default_rng([seed])), SIZE_PX)


def cosine(step: int, steps: int, warmup: int = 100, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def optimize(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step, gradients clipped to norm 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def save_state(name: str, state: dict) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old one or the new one, never half of one."""
    WORK_DIR.mkdir(exist_ok=True)
    target = WORK_DIR / f"{name}.pt"
    torch.save(state, target.with_suffix(".tmp"))
    os.replace(target.with_suffix(".tmp"), target)


def load_state(name: str) -> dict | None:
    """The last checkpoint written under `name`, or None."""
    path = WORK_DIR / f"{name}.pt"
    return torch.load(path, weights_only=True) if path.exists() else None


def trained_modules(name: str) -> dict:
    """The weights of the checkpoint written under `name`. Raises `ValueError` where there is none."""
    state = load_state(name)
    if state is None:
        raise ValueError(f"no checkpoint {name!r} in {WORK_DIR.name}; train first")
    return state["modules"]


def training_steps(
    name: str,
    steps: int,
    modules: dict[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    describe: Callable[[], str],
    save_seconds: float = 60.0,
    checkpoint_steps: tuple[int, ...] = (),
) -> Iterator[int]:
    """Yield the step numbers left to do; sets the learning rate, checkpoints, and prints progress with an ETA.

    The state kept is the modules, the optimizer and the step. Batches are functions of the step, so a resumed
    run sees the batches an uninterrupted one would have seen.
    """
    first = 0
    state = load_state(name)
    if state is not None:
        for key, module in modules.items():
            module.load_state_dict(state["modules"][key])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        print(f"[{name}] resumed at step {first} of {steps}", flush=True)

    def snapshot(done: int) -> dict:
        weights = {key: module.state_dict() for key, module in modules.items()}
        return {"modules": weights, "optimizer": optimizer.state_dict(), "step": done}

    started = saved = printed = time.monotonic()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * cosine(step, steps)
        yield step
        now = time.monotonic()
        done = step + 1
        if now - printed > 15 or done == steps:
            eta = (now - started) / (done - first) * (steps - done)
            print(f"[{name}] step {done}/{steps} {describe()} eta {eta / 60:.1f} min", flush=True)
            printed = now
        if now - saved > save_seconds or done == steps:
            save_state(name, snapshot(done))
            saved = now
        if done in checkpoint_steps:
            save_state(f"{name}-{done}", snapshot(done))


class Ema:
    """Moving average of weights with a warm-up of the decay; a module so that it checkpoints like one."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in module.state_dict().items():
            shadow = self.shadow[key]
            if value.dtype.is_floating_point:
                shadow.lerp_(value, 1 - decay)
            else:
                shadow.copy_(value)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.shadow

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.shadow = {k: v.clone() for k, v in state.items()}


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A scratch folder that takes `target`'s place when the block ends without an error."""
    scratch = WORK_DIR / f"{target.name}.new"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    for path in scratch.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files that only their owner can read
    old = WORK_DIR / f"{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    scratch.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def make_tokenizer(context_length: int):
    """A CLIPTokenizer whose words are the world's words; anything else falls back to letters.

    Trained rather than written by hand: hand-made merges split words and overflow a short context, and
    CLIPTokenizer(vocab_file=...) silently gives a vocabulary of three tokens.
    """
    from transformers import CLIPTokenizer

    from mmalign.synthetic.scenes import SPLITS, TIERS

    texts = [text for tier in TIERS for split in SPLITS for text in captions(tier, split)]
    trained = CLIPTokenizer().train_new_from_iterator(texts, vocab_size=700, show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        trained.save_pretrained(folder)
        path = Path(folder) / "tokenizer.json"
        content = json.loads(path.read_text())
        vocabulary = content["model"]["vocab"]
        # Training numbers the one-letter words ("a" among them) in the order of a hash table, which differs from
        # process to process: a build resumed after a kill would read its own captions with other ids.
        letters = sorted(token for token in vocabulary if len(token) == len("a</w>") and token.endswith("</w>"))
        ids = sorted(vocabulary[token] for token in letters)
        vocabulary.update(zip(letters, ids, strict=True))
        path.write_text(json.dumps(content, ensure_ascii=False))
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = context_length
    return tokenizer


def token_ids(tokenizer, texts: list[str]) -> torch.Tensor:
    """As the pipelines do it: padded to the model's length, cut beyond it."""
    return tokenizer(
        texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def forget_padding(folder: Path) -> None:
    """Clear the padding and truncation that a used tokenizer writes into its file; callers ask for their own."""
    for path in folder.rglob("tokenizer.json"):
        content = json.loads(path.read_text())
        content |= {"truncation": None, "padding": None}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
