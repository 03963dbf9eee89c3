"""A stream made of batches: which requests are described together, and what is done when that fails.

Knows sizes, memory that runs out and single culprits; the model is its subclass's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from vlm4rec_spark.models.captioning.captioner import Answer, Request

_POOL = 3
"""Batches' worth of requests at hand: one at work, and two out of which the next is chosen by size."""
_GROW_AFTER = 16
"""Batches that went well after memory ran out, before a batch twice as large is tried again."""


class BatchCaptioner(ABC):
    """A Captioner whose model describes `batch` requests at a time."""

    def __init__(self, batch_size: int):
        self.batch, self.at_once = batch_size, _POOL * batch_size
        self.begins: Callable[[Sequence[str]], None] = lambda keys: None
        self._fits, self._went_well = batch_size, 0
        self._held: list[Request] = []
        self._alone: list[Request] = []

    @abstractmethod
    def describe(self, batch: Sequence[Request]) -> list[Answer]:
        """One answer per request, in order, all from one call of the model. May raise anything."""

    def add(self, request: Request) -> None:
        self._held.append(request)

    def step(self) -> list[Answer]:
        """Describe the oldest request and those at hand whose photos are nearest to its in size: padding is work too.

        A batch for which memory runs out is halved, and batches grow again later; one that fails otherwise is tried
        again request by request.
        """
        while True:
            batch = [self._alone.pop(0)] if self._alone else self._nearest()
            self.begins([request.key for request in batch])
            try:
                answers = self.describe(batch)
            except Exception as failure:
                if len(batch) == 1:
                    return [
                        Answer(
                            batch[0].key, None, error_class=error_class(failure), error=str(failure)
                        )
                    ]
                if error_class(failure) == "out_of_memory":
                    self._held, self._fits, self._went_well = (
                        [*batch, *self._held],
                        len(batch) // 2,
                        0,
                    )
                else:
                    self._alone = batch
            else:
                self._grow()
                return answers

    def _nearest(self) -> list[Request]:
        width, height = self._held[0].image.size
        away = [
            abs(request.image.width - width) + abs(request.image.height - height)
            for request in self._held
        ]
        chosen = sorted(range(len(away)), key=away.__getitem__)[: self._fits]
        batch = [self._held[place] for place in chosen]
        self._held = [request for place, request in enumerate(self._held) if place not in chosen]
        return batch

    def _grow(self) -> None:
        self._went_well += 1
        if self._fits < self.batch and self._went_well == _GROW_AFTER:
            self._fits, self._went_well = min(self.batch, 2 * self._fits), 0


def error_class(failure: Exception) -> str:
    """What the table `captions` calls it."""
    name = type(failure).__name__
    # MemoryError, torch.OutOfMemoryError
    return "out_of_memory" if "Memory" in name else name
