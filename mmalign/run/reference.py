"""The reference's scores, computed once for K draws per row and then looked up.

The frozen reference enters a preference loss only through one number per request. With counter-based randomness these
numbers belong to (row, draw) alone, so K·N forwards up front replace one reference forward in every step; they pay for
themselves once a run visits each row more than K times.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mmalign.data.batches import Batches
from mmalign.run.atomic import write_bytes
from mmalign.types import Batch, Request, Score

SAVE_EVERY = 200


class ReferenceCache:
    """Scores `[N rows, K/num_draws visits, Q requests per row]` under the reference view.

    Args:
        path: file the table is kept in; an interrupted build continues.
        fingerprint: identity of reference weights, data, seed, augmentation, model and method; another one starts anew.
    """

    def __init__(self, path: Path, fingerprint: str, *, num_rows: int, num_visits: int, requests_per_row: int) -> None:
        self.path = path
        self.fingerprint = hashlib.blake2b(fingerprint.encode(), digest_size=12).hexdigest()
        self.table = torch.full((num_rows, num_visits, requests_per_row), float("nan"))
        found = _load(path)
        if found is not None:
            stored = bytes(found["fingerprint"].tolist()).decode() if "fingerprint" in found else ""
            if stored == self.fingerprint and found["table"].shape == self.table.shape:
                self.table = found["table"]

    def build(self, policy: Any, method: Any, batches: Batches, *, batch_size: int, progress: Any) -> int:
        """Fill this process's share of what is missing; returns the number of scored (row, visit) pairs."""
        missing = [tuple(index) for index in torch.isnan(self.table[:, :, 0]).nonzero().tolist()]
        missing.sort(key=lambda place: (place[1], place[0]))
        missing = missing[batches.rank :: batches.world_size]
        done = 0
        for number, start in enumerate(range(0, len(missing), batch_size)):
            visits = missing[start : start + batch_size]
            self.put(visits, score_reference(policy, method, batches.make(visits)))
            done += len(visits)
            progress(done, len(missing))
            if number % SAVE_EVERY == SAVE_EVERY - 1 and batches.rank == 0:
                self.save()
        return done

    def merge(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Join the shares of all processes; `reduce` sums a tensor over them."""
        filled = (~torch.isnan(self.table)).float()
        total, count = reduce(torch.nan_to_num(self.table)), reduce(filled)
        self.table = torch.where(count > 0, total / count.clamp(min=1), self.table)

    def put(self, visits: Sequence[tuple[int, int]], score_R: Tensor) -> None:
        score_QB = score_R.float().cpu().view(self.table.shape[2], len(visits))
        if not bool(torch.isfinite(score_QB).all()):
            raise FloatingPointError(
                f"the reference scores rows {[row for row, _ in visits]} as not finite: {score_QB}"
            )
        for column, (row, visit) in enumerate(visits):
            self.table[row, visit] = score_QB[:, column]

    def get(self, batch: Batch) -> Tensor:
        """`[R]` in the order of the method's requests."""
        score_BQ = torch.stack([self.table[row, visit] for row, visit in batch.slot_B])
        assert not torch.isnan(score_BQ).any(), "a reference score is missing from the cache"
        return score_BQ.T.reshape(-1)

    def save(self) -> None:
        tensors = {"table": self.table, "fingerprint": torch.tensor(list(self.fingerprint.encode()), dtype=torch.uint8)}
        write_bytes(self.path, save(tensors))


@torch.no_grad()
def score_reference(policy: Any, method: Any, batch: Batch, chunk: int | None = None) -> Tensor:
    """`[R]` reference scores of the method's requests, at the policy's own batch shapes."""
    with policy.view("reference"):
        return chunked(policy, method.requests(batch), chunk).value_R


def chunked(policy: Any, requests: Sequence[Request], chunk: int | None) -> Score:
    """Score at most `chunk` requests per forward."""
    parts = chunks(requests, chunk)
    scores = [policy.score([requests[index] for index in part]) for part in parts]
    if len(scores) == 1:
        return scores[0]
    order = torch.tensor([index for part in parts for index in part]).argsort()

    def join(values: list[Tensor]) -> Tensor:
        joined = torch.cat(values)
        return joined[order.to(joined.device)]

    lengths = [score.num_tokens_R for score in scores if score.num_tokens_R is not None]
    return Score(
        value_R=join([score.value_R for score in scores]),
        per_draw_RK=join([score.per_draw_RK for score in scores]),
        kind=scores[0].kind,
        num_tokens_R=join(lengths) if lengths else None,
    )


def chunks(requests: Sequence[Request], chunk: int | None) -> list[list[int]]:
    """Indices of `requests`, at most `chunk` together. Requests on one context stay neighbours: a language model shares it."""
    if chunk is None or chunk >= len(requests):
        return [list(range(len(requests)))]
    first: dict[int, int] = {}
    for index, request in enumerate(requests):
        first.setdefault(id(request.context), index)
    order = sorted(range(len(requests)), key=lambda index: (first[id(requests[index].context)], index))
    return [order[start : start + chunk] for start in range(0, len(order), chunk)]


def cache_fingerprint(**parts: Any) -> str:
    return json.dumps(parts, sort_keys=True, default=str)


def _load(path: Path) -> dict[str, Tensor] | None:
    """The stored table; None if there is none or it is damaged (it is built again)."""
    if not path.is_file():
        return None
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        return None
