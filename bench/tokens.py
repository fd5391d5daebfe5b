"""DPO on a language model that sees images: a step of trl's DPOTrainer over a step of ours.

    python bench/tokens.py [--quick] [--pairs 15]

Same tiny-width LLaVA in stock classes with 576 image tokens, same adapters, pairs, order, loss, optimizer and precision,
one thread. The other side is `trl.DPOTrainer.train()` itself, which runs in a second thread and is let go one step at a
time; never do both compute at once. Before anything is timed, the losses of the first steps are compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import Size
from side_by_side import Result, chosen_size, parser, print_results, side_by_side

from mmalign.builtin import builtin_path

LEARNING_RATE = 1e-4
LORA_RANK = 16
BETA = 0.1
BATCH_SIZE = 2
NUM_COMPARED = 10
LOSS_TOLERANCE = 1e-4
NUM_ROWS = 24


@dataclasses.dataclass(frozen=True)
class Llava:
    """(image_px / patch_px)² image tokens; responses of about `response_words` words."""

    image_px: int
    patch_px: int = 8
    response_words: int = 40


LLAVAS = {"quick": Llava(64), "small": Llava(192)}


def measure(size: Size, folder: Path) -> tuple[list[Result], list[str]]:
    """The lines of the table and what is to be said beside them."""
    if size.name not in LLAVAS:
        return [], [f"trl: not measured at size {size.name}"]
    if importlib.util.find_spec("trl") is None:
        return [], ["trl: not installed, not measured (pip install -e '.[bench]')"]
    version = importlib.metadata.version("trl")
    make_model(LLAVAS[size.name], folder / "llava")
    make_pairs(LLAVAS[size.name], folder / "pairs")
    results, worst = [], 0.0
    with one_thread():
        for name, data, target in (
            ("trl / ours, images encoded in each step", {"cache": False}, None),
            ("trl / ours", {}, 1.4),
            ("trl / ours, cached reference", {"cache_reference": 1}, 2.0),
        ):
            other: list[Trl] = []
            config = run_config(folder, data)

            def make_other(session: Any, policy: Any, batches: Any, other: list[Trl] = other) -> Trl:
                other.append(Trl(session, policy, batches, folder, size))
                return other[0]

            timing = side_by_side(config, make_other, size, warm_up_steps=NUM_COMPARED)
            other[0].stop()
            results.append(Result.speedup(name, timing, at_least=target))
            worst = max(worst, compare(Path(config["output_dir"]), other[0].losses))
    note = f"trl {version}: losses of the first {NUM_COMPARED} steps differ by at most {worst:.1e}"
    return results, [note]


def compare(run: Path, losses: list[torch.Tensor]) -> float:
    """Largest difference of the losses of the first steps. Raises `RuntimeError` above the tolerance."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ours = [line["loss"] for line in lines][:NUM_COMPARED]
    theirs = [float(loss) for loss in losses[:NUM_COMPARED]]
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    if worst > LOSS_TOLERANCE or len(ours) < NUM_COMPARED:
        raise RuntimeError(f"the two compute different losses, step by step {ours} and {theirs}")
    return worst


# --- the model and its data --------------------------------------------------------------------------------------------


def make_model(llava: Llava, folder: Path) -> None:
    """A LLaVA with random weights and the tokenizer, template and file layout of the bundled tiny one."""
    from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

    source = builtin_path("llava-tiny")
    config = AutoConfig.from_pretrained(source)
    vision = {"image_size": llava.image_px, "patch_size": llava.patch_px, "hidden_size": 96, "num_hidden_layers": 3}
    config.vision_config.update(vision | {"intermediate_size": 384, "num_attention_heads": 4})
    text = {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 384, "max_position_embeddings": 1024}
    config.text_config.update(text)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(source)
    processor.patch_size = llava.patch_px
    processor.image_processor.size = {"height": llava.image_px, "width": llava.image_px}
    processor.tokenizer.model_max_length = 1024
    processor.save_pretrained(folder)


def make_pairs(llava: Llava, folder: Path) -> None:
    """Drawn scenes as PNG, a question, and two responses of random words; read by our JSONL reader and given to trl."""
    from PIL import Image

    from mmalign.synthetic.questions import sample_objects_scene
    from mmalign.synthetic.render import render
    from mmalign.synthetic.scenes import COLOURS, SHAPES

    folder.mkdir()
    rng = np.random.default_rng(0)
    words = [*COLOURS, *SHAPES]

    def response() -> str:
        length = llava.response_words + int(rng.integers(-4, 4))
        return " ".join(words[int(rng.integers(len(words)))] for _ in range(length))

    pictures = render([sample_objects_scene("train", rng) for _ in range(NUM_ROWS)], llava.image_px)
    lines = []
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index}.png")
        row = {"id": str(index), "images": [f"{index}.png"], "prompt": "<image>\nwhat is in the image ?"}
        lines.append(json.dumps(row | {"chosen": response(), "rejected": response()}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")


def run_config(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Our run: defaults wherever a user would have them."""
    return {
        "model": {
            "family": "llava",
            "path": str(folder / "llava"),
            "attention": "sdpa",
            "lora": {"rank": LORA_RANK, "alpha": 2 * LORA_RANK, "targets": "all"},
        },
        "method": {"preset": "dpo", "losses": [{"name": "dpo", "beta": BETA}]},
        "data": {
            "path": str(folder / "pairs" / "pairs.jsonl"),
            **({"cache_dir": str(folder / "cache")} if data.get("cache", True) else {}),
            **data,
        },
        "train": {"steps": 10**6, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "weight_decay": 0.0},
        "run": {"preflight": False, "tracker": "none", "log_every": 1},
        "output_dir": str(folder / f"run-{time.monotonic_ns()}"),
    }


# --- the other side ----------------------------------------------------------------------------------------------------


class Trl:
    """`DPOTrainer.train()` in its own thread; each call lets it do one step and waits for its end.

    Args:
        session, policy, batches: of our run, whose adapters and order of rows it takes over.
    """

    def __init__(self, session: Any, policy: Any, batches: Any, folder: Path, size: Size) -> None:
        self.losses: list[torch.Tensor] = []
        num_steps = 2 + NUM_COMPARED + size.num_pairs * size.steps_per_block
        visits = [visit for step in range(num_steps) for visit in batches.visits(step, 0)]
        self.trainer = self._trainer([batches.rows[index] for index, _ in visits], folder, num_steps)
        take_over_adapters(policy, self.trainer.model)
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait()

    def __call__(self) -> torch.Tensor:
        self._go.release()
        self._wait()
        return self.losses[-1]

    def stop(self) -> None:
        self._stopped = True
        self._go.release()
        self._thread.join()

    def between_steps(self) -> None:
        """Called by the trainer's thread: hand over, and continue when called for."""
        self._done.release()
        self._go.acquire()
        if self._stopped:
            raise _Stop

    def _wait(self) -> None:
        self._done.acquire()
        if self._error is not None:
            raise RuntimeError("trl's trainer failed") from self._error

    def _run(self) -> None:
        torch.set_num_threads(1)  # OpenMP keeps this number per thread
        try:
            with contextlib.suppress(_Stop):
                self.trainer.train()
        except BaseException as error:
            self._error = error
        self._done.release()

    def _trainer(self, rows: list[Any], folder: Path, num_steps: int) -> Any:
        from peft import LoraConfig
        from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
        from transformers.utils import logging
        from trl import DPOConfig, DPOTrainer

        outer = self
        logging.disable_progress_bar()

        class Stepwise(TrainerCallback):
            def on_train_begin(self, *arguments: Any, **named: Any) -> None:
                outer.between_steps()

            def on_step_end(self, *arguments: Any, **named: Any) -> None:
                outer.between_steps()

        class InOrder(DPOTrainer):
            def _get_train_sampler(self, dataset: Any = None) -> Any:
                return torch.utils.data.SequentialSampler(self.train_dataset)

            def compute_loss(self, *arguments: Any, **named: Any) -> Any:
                loss = super().compute_loss(*arguments, **named)
                outer.losses.append(loss.detach())
                return loss

        settings = DPOConfig(
            output_dir=str(folder / "trl"),
            max_steps=num_steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            optim="adamw_torch",
            beta=BETA,
            # What it would do otherwise and we would not: recompute activations, compute in bf16, cut at 1024 tokens.
            gradient_checkpointing=False,
            bf16=False,
            max_length=None,
            remove_unused_columns=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        targets = r"model\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        return InOrder(
            model=AutoModelForImageTextToText.from_pretrained(folder / "llava", attn_implementation="sdpa"),
            args=settings,
            train_dataset=trl_rows(rows),
            processing_class=AutoProcessor.from_pretrained(folder / "llava"),
            peft_config=LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.0, target_modules=targets),
            callbacks=[Stepwise()],
        )


class _Stop(Exception):  # noqa: N818 (not an error: leaves the trainer's loop)
    pass


def trl_rows(rows: list[Any]) -> Any:
    """The same rows as trl's vision preference data set, images encoded as PNG."""
    from datasets import Dataset

    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return Dataset.from_list(
        [
            {
                "images": [ref.open() for ref in row.images],
                "prompt": said("user", row.prompt.removeprefix("<image>\n")),
                "chosen": said("assistant", row.chosen),
                "rejected": said("assistant", row.rejected),
            }
            for row in rows
        ]
    )


def take_over_adapters(policy: Any, model: Any) -> None:
    """Start trl's adapters from ours. Raises `RuntimeError` when they are not the same layers."""
    ours = {name.replace(".mmalign.", ".default."): parameter for name, parameter in policy.trainable()}
    theirs = {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"different layers are adapted: {sorted(ours.keys() ^ theirs.keys())[:4]}")
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main() -> None:
    import tempfile

    size = chosen_size(parser(__doc__.splitlines()[0]).parse_args())
    with tempfile.TemporaryDirectory(prefix="mmalign-bench-") as name:
        results, notes = measure(size, Path(name))
    print_results(results, f"trl / ours, size {size.name}, 1 thread", notes)


if __name__ == "__main__":
    main()
