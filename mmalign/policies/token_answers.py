"""Answers of a language model, generated in batches whose composition does not matter.

Shape legend: N prompts of a batch, L padded prompt length, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmalign import randomness
from mmalign.policies.token_network import TokenNetwork
from mmalign.policies.token_rows import TokenContext, image_rows


class GumbelNoise:
    """A logits processor that turns greedy decoding into sampling: argmax(logits / temperature + Gumbel noise).

    The noise of an answer is a function of (seed, row id, step) alone. Two models that see the same noise differ in their
    answers only where their distributions do, so base and tuned model are compared with little variance.

    Args:
        keys: (seed, row id) of each answer of the batch.
        temperature: > 0.
    """

    def __init__(self, keys: Sequence[tuple[int, str]], temperature: float) -> None:
        self.keys, self.temperature = keys, temperature

    def __call__(self, input_ids: Tensor, scores_NV: Tensor) -> Tensor:
        step = input_ids.shape[1]
        noise_NV = torch.stack([gumbel(scores_NV.shape[1], seed, row_id, step) for seed, row_id in self.keys])
        return scores_NV.float() / self.temperature + noise_NV.to(scores_NV.device)


def gumbel(size: int, seed: int, row_id: str, step: int) -> Tensor:
    """Standard Gumbel noise for one step of one answer: −log of an exponential."""
    generator = randomness.generator(seed, "answer", row_id, step)
    exponential = torch.empty(size).exponential_(generator=generator)
    return -exponential.clamp_min_(torch.finfo(torch.float32).tiny).log_()


@torch.no_grad()
def generate(
    model: Any,
    network: TokenNetwork,
    contexts: Sequence[TokenContext],
    keys: Sequence[tuple[int, str]],
    *,
    image_token_id: int,
    pad_token_id: int,
    end_ids: Sequence[int],
    temperature: float,
    max_new_tokens: int,
    device: torch.device,
) -> list[list[int]]:
    """New token ids of each answer, without what follows its end.

    Args:
        model: whose `generate` runs; `network` wraps the same weights.
        keys: (seed, row id) of each answer.
        end_ids: tokens that end an answer.
        temperature: 0 is greedy.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    ids_NL, mask_NL = left_padded([context.ids for context in contexts], pad_token_id)
    features = {name: f for c in contexts for name, f in zip(c.image_ids, c.features, strict=True)}
    row_S, column_S, feature_S = image_rows(ids_NL, mask_NL.bool(), contexts, list(features), image_token_id)
    embeds_NLD = network.embed(
        ids_NL.to(device),
        [feature.to(device) for feature in features.values()],
        row_S.to(device),
        column_S.to(device),
        feature_S.to(device),
    )
    noise = LogitsProcessorList([GumbelNoise(keys, temperature)] if temperature > 0 else [])
    with _plain_settings(model, GenerationConfig(eos_token_id=list(end_ids), pad_token_id=pad_token_id)):
        new_NT = model.generate(
            inputs_embeds=embeds_NLD,
            attention_mask=mask_NL.to(device),
            logits_processor=noise,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    return [_until_end(ids, set(end_ids)) for ids in new_NT.tolist()]


def left_padded(prompts: Sequence[Tensor], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask `[N, L]`, padded on the left so that all prompts end together."""
    length = max(len(ids) for ids in prompts)
    ids_NL = torch.full((len(prompts), length), pad_token_id, dtype=torch.long)
    mask_NL = torch.zeros_like(ids_NL)
    for n, ids in enumerate(prompts):
        ids_NL[n, length - len(ids) :], mask_NL[n, length - len(ids) :] = ids, 1
    return ids_NL, mask_NL


@contextmanager
def _plain_settings(model: Any, settings: Any) -> Iterator[None]:
    """Generate from the model's own distribution.

    A checkpoint's generation settings (repetition penalty, top-p …) would be filled in otherwise, and what is measured
    would not be the distribution that was trained.
    """
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    end = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    return ids[:end]
