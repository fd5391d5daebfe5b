"""What the framework costs: an optimizer step of Diffusion-DPO over the bare network passes it is made of.

    python bench/overhead.py [--quick] [--variant lora]

Ours is the training loop from cached features to the logged line. Bare is written by hand on tensors that are already
there: policy forward, reference forward, loss, backward, clip, optimizer step, and not one line more.
Shape legend: R images (chosen, then rejected), B pairs, C/h/w latent dims, S tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import Size
from peft.tuners.tuners_utils import BaseTunerLayer
from side_by_side import (
    Result,
    check_same_work,
    chosen_size,
    chosen_variants,
    parser,
    print_results,
    reference_network,
    run_config,
    side_by_side,
    workplace,
)
from torch.nn.functional import logsigmoid

TARGET = 1.05
BETA = 5000.0


class Bare:
    """One step on fixed tensors, with the policy's own network and the run's own optimizer."""

    def __init__(self, session: Any, policy: Any, batches: Any) -> None:
        self.network, self.autocast = policy.pipe.unet, policy.autocast
        self.reference = reference_network(policy)
        # Not PEFT's own switches: they also walk over all parameters, which is overhead.
        self.adapters = [module for module in self.network.modules() if isinstance(module, BaseTunerLayer)]
        self.parameters = [parameter for _, parameter in policy.trainable()]
        self.optimizer = session.optimizer.optimizer
        batch = batches.make(batches.visits(0, 0))
        size, device = 2 * len(batch), policy.device
        generator = torch.Generator().manual_seed(0)
        shape = (size, *batch.chosen[0]["mean"].shape)
        self.noised_RChw = torch.randn(shape, generator=generator).to(device)
        self.noise_RChw = torch.randn(shape, generator=generator).to(device)
        self.t_R = torch.randint(0, 1000, (size,), generator=generator).to(device)
        contexts = [*batch.context, *batch.context]
        pixels = float(policy.resolution)
        self.conditioning = {
            "encoder_hidden_states": torch.stack([context["embeds"] for context in contexts]).to(device),
            "added_cond_kwargs": {
                "text_embeds": torch.stack([context["pooled"] for context in contexts]).to(device),
                "time_ids": torch.tensor([[pixels, pixels, 0.0, 0.0, pixels, pixels]] * size, device=device),
            },
        }

    def __call__(self) -> torch.Tensor:
        with torch.no_grad():
            self._switch(off=True)
            reference_R = self._score(self.network if self.reference is None else self.reference)
            self._switch(off=False)
        ratio_R = self._score(self.network) - reference_R
        chosen_B, rejected_B = ratio_R.chunk(2)
        loss = -logsigmoid(BETA * (chosen_B - rejected_B)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _score(self, network: Any) -> torch.Tensor:
        with self.autocast():
            predicted = network(self.noised_RChw, self.t_R, return_dict=False, **self.conditioning)[0]
        return -0.5 * (predicted.float() - self.noise_RChw).square().flatten(1).mean(1)

    def _switch(self, *, off: bool) -> None:
        for module in self.adapters:
            module._disable_adapters = off


def measure(size: Size, folder: Path, variants: tuple[str, ...]) -> list[Result]:
    results = []
    for variant in variants:
        timing = side_by_side(run_config(size, folder, lora=variant == "lora"), Bare, size)
        check_same_work(timing.ours_flops, timing.other_flops)
        results.append(Result.slowdown(f"overhead, {variant}", timing, at_most=TARGET))
    return results


def main() -> None:
    options = parser(__doc__.splitlines()[0]).parse_args()
    size = chosen_size(options)
    with workplace(size) as folder:
        results = measure(size, folder, chosen_variants(options))
    print_results(results, f"ours / bare, size {size.name}", [])


if __name__ == "__main__":
    main()
