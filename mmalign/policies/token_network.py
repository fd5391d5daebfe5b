"""What a training forward of a language model runs: projector, language model, log-probabilities of the responses.

Shape legend: N rows, L row length, A position axes, D hidden width, S image tokens, M response tokens of all requests,
C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmalign.policies.token_rows import Rows

CHUNK_LOGITS = 2**24
"""Logits held at a time: 64 MiB in fp32."""


@dataclass(frozen=True)
class Parts:
    """The modules of an image-text-to-text model. `projector` maps vision features `[S, D_vision]` to `[S, D]`."""

    vision: nn.Module
    projector: nn.Module
    language: nn.Module
    embedding: nn.Module
    head: nn.Linear


class TokenNetwork(nn.Module):
    """Rows and vision features in, log-probability of each response token out.

    A module, so that DDP can wrap it: gradients are reduced by hooks on its forward.

    Args:
        model: the whole model; `parts` are submodules of it.
        gradient_checkpointing: recompute each language-model layer in the backward pass.
    """

    def __init__(self, model: nn.Module, parts: Parts, *, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.model = model
        self._parts = parts
        self._layers = _checkpointed_layers(parts.language) if gradient_checkpointing else []
        self.chunk_logits = CHUNK_LOGITS

    def forward(self, rows: Rows, features: Sequence[Tensor]) -> Tensor:
        """Log-probabilities `[M]` in nats, fp32.

        Args:
            rows: on the device.
            features: vision features of `rows.image_ids`, on the device.
        """
        parts = self._parts
        embeds_NLD = self.embed(rows.ids_NL, features, rows.image_row_S, rows.image_column_S, rows.image_feature_S)
        position_ANL = rows.position_ANL
        with self._checkpointing():
            hidden_NLD = parts.language(
                inputs_embeds=embeds_NLD,
                attention_mask=rows.mask(_compute_dtype(embeds_NLD)),
                position_ids=position_ANL[0] if len(position_ANL) == 1 else position_ANL,
                use_cache=False,
            ).last_hidden_state
        hidden_MD = hidden_NLD[rows.state_row_M, rows.state_column_M]
        return token_logps(parts.head, hidden_MD, rows.target_M, chunk_logits=self.chunk_logits)

    def embed(self, ids_NL: Tensor, features: Sequence[Tensor], row_S: Tensor, column_S: Tensor, feature_S: Tensor):
        """Input embeddings `[N, L, D]`: of the tokens, and of the projected features in the place of image tokens."""
        parts = self._parts
        embeds_NLD = parts.embedding(ids_NL)
        if features:
            projected_SD = parts.projector(torch.cat(list(features)))
            image_SD = projected_SD[feature_S].to(embeds_NLD.dtype)
            return embeds_NLD.index_put((row_S, column_S), image_SD)
        trained = [p for p in parts.projector.parameters() if p.requires_grad]
        if trained and torch.is_grad_enabled():
            # A batch without images must still give the projector a gradient, of zero: DDP waits for every parameter.
            embeds_NLD = embeds_NLD + 0.0 * sum(p.sum() for p in trained)
        return embeds_NLD

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """transformers recomputes layers in training mode only. The network stays in eval mode (no dropout), so the flag
        is set on the layers themselves, not on what they hold, and only here: it would break the cache of `generate`."""
        for layer in self._layers:
            layer.training = torch.is_grad_enabled()
        try:
            yield
        finally:
            for layer in self._layers:
                layer.training = False


def _checkpointed_layers(language: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[nn.Module] = [
        module for module in language.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if not layers:
        raise ValueError(
            f"model.gradient_checkpointing: {type(language).__name__} does not support it; set it to false"
        )
    for layer in layers:
        # Not reentrant: with frozen embeddings a reentrant checkpoint would cut the graph in front of every adapter.
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
        layer.gradient_checkpointing = True  # type: ignore[assignment]
    return layers


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def token_logps(head: nn.Linear, hidden_MD: Tensor, target_M: Tensor, *, chunk_logits: int = CHUNK_LOGITS) -> Tensor:
    """log p(target) under softmax(head(hidden)), `[M]`, fp32.

    Computed in chunks of at most `chunk_logits` logits, each recomputed in the backward pass: the `[M, V]` logits, the
    largest tensor of a step by far, never exist.
    """
    size = max(1, chunk_logits // head.out_features)
    chunks = zip(hidden_MD.split(size), target_M.split(size), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([_chunk_logps(head, hidden_CD, target_C) for hidden_CD, target_C in chunks])
    return torch.cat(
        [
            checkpoint(_chunk_logps, head, hidden_CD, target_C, use_reentrant=False, preserve_rng_state=False)
            for hidden_CD, target_C in chunks
        ]
    )


def _chunk_logps(head: nn.Module, hidden_CD: Tensor, target_C: Tensor) -> Tensor:
    logits_CV = head(hidden_CD).float()
    return logits_CV.gather(1, target_C[:, None]).squeeze(1) - logits_CV.logsumexp(1)
