"""The reference's scores, computed once for K draws per row and then looked up.

The frozen reference enters a preference loss only through one number per request. With counter-based randomness these
numbers belong to (row, draw) alone, so K·N forwards up front replace one reference forward in every step; they pay for
themselves once a run visits each row more than K times.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from mmalign.data.batches import Batches
from mmalign.run.atomic import write_bytes
from mmalign.types import Batch

SAVE_EVERY = 200


class ReferenceCache:
    """Scores `[N rows, K/num_draws visits, Q requests per row]` under the reference view.

    Args:
        path: file the table is kept in; an interrupted build continues.
        fingerprint: identity of reference weights, data, seed, augmentation and method; another one starts anew.
    """

    def __init__(self, path: Path, fingerprint: str, *, num_rows: int, num_visits: int, requests_per_row: int) -> None:
        self.path = path
        self.fingerprint = hashlib.blake2b(fingerprint.encode(), digest_size=12).hexdigest()
        self.table = torch.full((num_rows, num_visits, requests_per_row), float("nan"))
        if path.is_file():
            found = load_file(path)
            stored = bytes(found["fingerprint"].tolist()).decode() if "fingerprint" in found else ""
            if stored == self.fingerprint and found["table"].shape == self.table.shape:
                self.table = found["table"]

    def build(self, policy: Any, method: Any, batches: Batches, *, batch_size: int, progress: Any) -> int:
        """Fill what is missing; returns the number of scored (row, visit) pairs."""
        missing = [tuple(index) for index in torch.isnan(self.table[:, :, 0]).nonzero().tolist()]
        missing.sort(key=lambda place: (place[1], place[0]))
        done = 0
        for number, start in enumerate(range(0, len(missing), batch_size)):
            visits = missing[start : start + batch_size]
            self.put(visits, score_reference(policy, method, batches.make(visits)))
            done += len(visits)
            progress(done, len(missing))
            if number % SAVE_EVERY == SAVE_EVERY - 1:
                self.save()
        if done:
            self.save()
        return done

    def put(self, visits: Sequence[tuple[int, int]], score_R: Tensor) -> None:
        score_QB = score_R.float().cpu().view(self.table.shape[2], len(visits))
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
def score_reference(policy: Any, method: Any, batch: Batch) -> Tensor:
    """`[R]` reference scores of the method's requests."""
    with policy.view("reference"):
        return policy.score(method.requests(batch)).value_R


def cache_fingerprint(**parts: Any) -> str:
    return json.dumps(parts, sort_keys=True, default=str)
