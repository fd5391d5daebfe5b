"""Which rows meet which randomness in which step: a pure function of (seed, step), so there is no loader state to save.

Positions run through the epochs without a gap: step s takes positions [s·G, (s+1)·G) of the concatenated permutations,
with G = batch_size · accumulate · processes; micro-batch and process pick slices of those G. The draw ids of a row in
epoch e are e·K … e·K + K−1, taken modulo C when C cached reference draws are cycled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch

from mmalign import randomness
from mmalign.config import DataConfig
from mmalign.data.features import Features
from mmalign.types import Batch, DrawKey, Row


@dataclass(frozen=True)
class Order:
    """The data order. Positions count rows over all epochs."""

    num_rows: int
    seed: int

    def row(self, position: int) -> tuple[int, int]:
        """(row index, epoch) of a position."""
        epoch, place = divmod(position, self.num_rows)
        return int(_permutation(self.num_rows, self.seed, epoch)[place]), epoch


@lru_cache(maxsize=4)
def _permutation(num_rows: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(num_rows, generator=randomness.generator(seed, "order", "", epoch))


class Batches:
    """Encoded batches by (step, micro-batch).

    Args:
        rows: all rows of the run.
        features: encodes or looks up contexts and targets.
        data: the `data` section.
        seed: of the run.
        batch_size, accumulate: rows per forward, forwards per step.
        num_draws: K draws per row and visit.
        negatives: whether the method contrasts images.
        rank, world_size: this process's place.
    """

    why_other_rows = (
        "another number of processes or another train.accumulate. Set train.accumulate so that batch_size x accumulate x "
        "processes is what it was"
    )
    """How a run to be continued can have another `rows_per_step`, and what to do."""

    def __init__(
        self,
        rows: Sequence[Row],
        features: Features,
        data: DataConfig,
        *,
        seed: int,
        batch_size: int,
        accumulate: int,
        num_draws: int = 1,
        negatives: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if data.cache_reference and data.cache_reference % num_draws:
            raise ValueError(
                f"data.cache_reference = {data.cache_reference}: must be a multiple of train.num_draws = {num_draws}"
            )
        self.rows, self.features, self.data, self.seed = rows, features, data, seed
        self.batch_size, self.accumulate, self.num_draws = batch_size, accumulate, num_draws
        self.negatives = negatives
        self.rank, self.world_size = rank, world_size
        self.order = Order(len(rows), seed)

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulate * self.world_size

    def visits(self, step: int, micro: int) -> list[tuple[int, int]]:
        """(row index, visit number of that row) of this process's micro-batch."""
        start = step * self.rows_per_step + (micro * self.world_size + self.rank) * self.batch_size
        return [self.order.row(position) for position in range(start, start + self.batch_size)]

    def make(self, visits: Sequence[tuple[int, int]]) -> Batch:
        """The batch of these (row index, visit) pairs.

        What varies between visits (crop, flip, prompt dropout, image negative) follows from the visit's number, which is
        cycled like the draws.
        """
        rows = [self.rows[index] for index, _ in visits]
        draws = [self._draws(visit) for _, visit in visits]
        numbers = [ds[0] // self.num_draws for ds in draws]
        paired = [row for row in rows if row.rejected is not None]
        assert len(paired) in (0, len(rows)), "rows with and without `rejected` are told apart before training"
        read = [side for side in self.features.sides if side == "chosen" or paired]
        target = {side: self.features.targets(rows, side, numbers) for side in read}
        return Batch(
            rows=rows,
            context=self.features.contexts(rows, numbers),
            chosen=target.get("chosen", []),
            rejected=target.get("rejected", []),
            negative=self.features.negatives(rows, numbers) if self.negatives else [],
            keys=[[DrawKey(self.seed, row.id, d) for d in ds] for row, ds in zip(rows, draws, strict=True)],
            preference_B=torch.tensor([row.preference for row in rows]),
            slot_B=[(index, number) for (index, _), number in zip(visits, numbers, strict=True)],
        )

    def iterate(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """All micro-batches of steps [first_step, last_step), prepared `num_workers` ahead in threads."""
        places = ((step, micro) for step in range(first_step, last_step) for micro in range(self.accumulate))
        if not self.data.num_workers:
            for step, micro in places:
                yield self.make(self.visits(step, micro))
            return
        with ThreadPoolExecutor(self.data.num_workers) as pool:
            waiting: list[Future[Batch]] = []
            for step, micro in places:
                waiting.append(pool.submit(self.make, self.visits(step, micro)))
                if len(waiting) > self.data.num_workers:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()

    def _draws(self, visit: int) -> list[int]:
        first = visit * self.num_draws
        if self.data.cache_reference:
            first %= self.data.cache_reference
        return list(range(first, first + self.num_draws))
