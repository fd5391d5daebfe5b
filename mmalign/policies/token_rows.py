"""Score requests on a language model, packed as rows `[prompt | response 1 | … | response n]` that share their prompt.

Every response continues after the last prompt position and sees the prompt and itself alone, so the row computes what n
separate sequences would. The last token of a response is never an input: nothing is predicted from it.

Shape legend: R requests, N rows, L row length (Q as queries, K as keys), A position axes, P prompt tokens, T response
tokens, M response tokens of all requests, S image tokens of all rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

PADDING, PROMPT = -1, 0


@dataclass(frozen=True, eq=False)
class TokenContext:
    """What a response is conditioned on.

    Args:
        ids: prompt token ids `[P]`, each image's placeholder already repeated to its number of image tokens.
        features: frozen vision features `[T_i, D]` of each image, in the order of their placeholders.
        image_ids: identity of each image (its content and what was done to it). Prompts are shared between requests with
            the same `image_ids` and ids, never by ids alone: placeholders look alike whatever the image.
    """

    ids: Tensor
    features: tuple[Tensor, ...]
    image_ids: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class TokenTarget:
    """A response: token ids `[T]`, the end-of-turn token included."""

    ids: Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """N padded rows that hold R responses.

    Args:
        ids_NL: token ids, padded on the right.
        position_ANL: positions; A = 1 unless the model has several position axes.
        segment_NL: −1 padding, 0 prompt, k ≥ 1 the row's k-th response.
        image_row_S, image_column_S, image_feature_S: where each image token lies, and which row it takes from the
            concatenated features of `image_ids`.
        image_ids: the different images, in the order their features are to be concatenated.
        state_row_M, state_column_M: the hidden state that predicts each response token: the token before it, or the last
            of the prompt.
        target_M, request_M, step_M: each response token's id, request and place in the response.
        shared: whether responses share prompts; if not, each row is an ordinary sequence.
    """

    ids_NL: Tensor
    position_ANL: Tensor
    segment_NL: Tensor
    image_row_S: Tensor
    image_column_S: Tensor
    image_feature_S: Tensor
    image_ids: tuple[str, ...]
    state_row_M: Tensor
    state_column_M: Tensor
    target_M: Tensor
    request_M: Tensor
    step_M: Tensor
    shared: bool

    def to(self, device: torch.device) -> Rows:
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Attention mask: additive `[N, 1, L, L]` of shared rows; of ordinary ones 1 for tokens, 0 for padding `[N, L]`.

        Padding sees itself alone: a softmax over nothing would be NaN, and NaN times a zero gradient stays NaN.
        """
        if not self.shared:
            return (self.segment_NL != PADDING).long()
        length = self.segment_NL.shape[1]
        order = torch.arange(length, device=self.segment_NL.device)
        key_N1K, query_NQ1 = self.segment_NL[:, None, :], self.segment_NL[:, :, None]
        related_NQK = (key_N1K == query_NQ1) | ((key_N1K == PROMPT) & (query_NQ1 != PADDING))
        alone_NQK = (query_NQ1 != PADDING) | (order[None, None, :] == order[None, :, None])
        allowed_NQK = related_NQK & alone_NQK & (order[None, None, :] <= order[None, :, None])
        mask_NQK = torch.zeros(allowed_NQK.shape, dtype=dtype, device=allowed_NQK.device)
        return mask_NQK.masked_fill_(~allowed_NQK, torch.finfo(dtype).min)[:, None]


@dataclass
class _Row:
    context: TokenContext
    responses: list[tuple[int, Tensor]]
    """(index of the request, response ids)"""


def pack(
    contexts: Sequence[TokenContext],
    targets: Sequence[TokenTarget],
    *,
    image_token_id: int,
    pad_token_id: int,
    share: bool,
    positions: Callable[[TokenContext], Tensor] | None = None,
    multiple: int = 1,
) -> Rows:
    """Rows for R requests.

    Args:
        contexts, targets: of each request.
        image_token_id: the placeholder in `ids`.
        pad_token_id: fills rows up to the longest; any valid id, its states are never read.
        share: one row for all responses to the same prompt and images; False makes one row per request.
        positions: positions `[A, P]` of a prompt; default 0, 1, 2 … on one axis.
        multiple: row length is rounded up to a multiple of this (alignment of the mask for GPU kernels).

    Raises `ValueError` when a context's placeholders and features differ in number.
    """
    rows = _group(contexts, targets, share)
    image_ids = list(dict.fromkeys(name for context in contexts for name in context.image_ids))
    lengths = [len(r.context.ids) + sum(len(ids) - 1 for _, ids in r.responses) for r in rows]
    length = -(-max(lengths) // multiple) * multiple
    ids_NL = torch.full((len(rows), length), pad_token_id, dtype=torch.long)
    segment_NL = torch.full((len(rows), length), PADDING, dtype=torch.long)
    positions_N, states_M, targets_M, requests_M = [], [], [], []
    for n, row in enumerate(rows):
        num_prompt = len(row.context.ids)
        position_AP = positions(row.context) if positions is not None else torch.arange(num_prompt)[None]
        # Continue on all axes from the largest prompt position: what a model with one axis and one with three both do.
        start = int(position_AP.max()) + 1
        ids_NL[n, :num_prompt], segment_NL[n, :num_prompt] = row.context.ids, PROMPT
        parts, column = [position_AP], num_prompt
        for k, (request, ids) in enumerate(row.responses, start=1):
            end = column + len(ids) - 1
            ids_NL[n, column:end], segment_NL[n, column:end] = ids[:-1], k
            parts.append((start + torch.arange(len(ids) - 1)).expand(len(position_AP), -1))
            states = torch.cat([torch.tensor([num_prompt - 1]), torch.arange(column, end)])
            states_M.append(torch.stack([torch.full_like(states, n), states]))
            targets_M.append(ids)
            requests_M.append(torch.stack([torch.full_like(states, request), torch.arange(len(ids))]))
            column = end
        position_AL = torch.cat(parts, 1)
        positions_N.append(torch.nn.functional.pad(position_AL, (0, length - column)))
    prompts = [row.context for row in rows]
    row_S, column_S, feature_S = image_rows(ids_NL, segment_NL == PROMPT, prompts, image_ids, image_token_id)
    state_2M, request_2M = torch.cat(states_M, 1), torch.cat(requests_M, 1)
    return Rows(
        ids_NL=ids_NL,
        position_ANL=torch.stack(positions_N, 1),
        segment_NL=segment_NL,
        image_row_S=row_S,
        image_column_S=column_S,
        image_feature_S=feature_S,
        image_ids=tuple(image_ids),
        state_row_M=state_2M[0],
        state_column_M=state_2M[1],
        target_M=torch.cat(targets_M),
        request_M=request_2M[0],
        step_M=request_2M[1],
        shared=share,
    )


def _group(contexts: Sequence[TokenContext], targets: Sequence[TokenTarget], share: bool) -> list[_Row]:
    rows: dict[Any, _Row] = {}
    for request, (context, target) in enumerate(zip(contexts, targets, strict=True)):
        if len(context.ids) == 0 or len(target.ids) == 0:
            raise ValueError(f"request {request}: the {'prompt' if len(target.ids) else 'response'} has no tokens")
        key = (context.image_ids, context.ids.numpy().tobytes()) if share else request
        rows.setdefault(key, _Row(context, [])).responses.append((request, target.ids))
    return list(rows.values())


def image_rows(
    ids_NL: Tensor, prompt_NL: Tensor, contexts: Sequence[TokenContext], image_ids: Sequence[str], image_token_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column of each image token, and which row of the concatenated features of `image_ids` it takes, `[S]` each.

    Args:
        prompt_NL: where prompts are; row n holds the prompt of `contexts[n]`.

    Raises `ValueError` when a context's placeholders and features differ in number.
    """
    sizes = {name: len(f) for context in contexts for name, f in zip(context.image_ids, context.features, strict=True)}
    starts = dict(zip(image_ids, itertools.accumulate((sizes[name] for name in image_ids), initial=0), strict=False))
    found: list[Tensor] = [torch.zeros(0, dtype=torch.long)]
    for context in contexts:
        num_features = sum(sizes[name] for name in context.image_ids)
        num_tokens = int((context.ids == image_token_id).sum())
        if num_tokens != num_features:
            raise ValueError(
                f"the prompt has {num_tokens} image tokens, its {len(context.image_ids)} image(s) have {num_features} "
                f"features: they were encoded by another image processor, or images of different sizes were exchanged"
            )
        found += [starts[name] + torch.arange(sizes[name]) for name in context.image_ids]
    row_S, column_S = (ids_NL.eq(image_token_id) & prompt_NL).nonzero(as_tuple=True)
    return row_S, column_S, torch.cat(found)
