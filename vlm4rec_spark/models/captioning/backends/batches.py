"""A captioner that works in batches: which requests go together, and what follows a failure.

Knows sizes, out-of-memory errors and single failing requests. Its subclasses know the model.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from vlm4rec_spark.models.captioning.captioner import Answer, Captioner, Request

_BATCHES_IN_FLIGHT = 3
"""One at work, and two from which the next is chosen by size."""
_GROW_AFTER = 16
"""Successful batches after an out-of-memory error before a batch twice as large is tried."""


class BatchCaptioner(Captioner, ABC):
    """A Captioner whose model describes `batch_size` requests at a time."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.max_in_flight = _BATCHES_IN_FLIGHT * batch_size
        self._fitting_size = batch_size
        self._successes = 0
        self._waiting: list[Request] = []
        self._singles: list[Request] = []

    @abstractmethod
    def describe(self, batch: Sequence[Request]) -> list[Answer]:
        """One answer per request, in order, from one call of the model. May raise anything."""

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    def step(self) -> list[Answer]:
        """Describe the oldest request, with those of similar photo size: padding costs time.

        A batch that runs out of memory is halved, and later batches grow again.
        A batch with another error is retried request by request.
        """
        while True:
            batch = [self._singles.pop(0)] if self._singles else self._next_batch()
            self.on_begin([request.key for request in batch])
            try:
                answers = self.describe(batch)
            except Exception as failure:
                if len(batch) == 1:
                    return [failed(batch[0].key, failure)]
                if error_class(failure) == "out_of_memory":
                    self._waiting = [*batch, *self._waiting]
                    self._fitting_size = len(batch) // 2
                    self._successes = 0
                else:
                    self._singles = batch
            else:
                self._grow()
                return answers

    def _next_batch(self) -> list[Request]:
        width, height = self._waiting[0].image.size

        def size_difference(index: int) -> int:
            image = self._waiting[index].image
            return abs(image.width - width) + abs(image.height - height)

        indices = sorted(range(len(self._waiting)), key=size_difference)[: self._fitting_size]
        batch = [self._waiting[index] for index in indices]
        self._waiting = [
            request for index, request in enumerate(self._waiting) if index not in indices
        ]
        return batch

    def _grow(self) -> None:
        self._successes += 1
        if self._fitting_size < self.batch_size and self._successes == _GROW_AFTER:
            self._fitting_size = min(self.batch_size, 2 * self._fitting_size)
            self._successes = 0


def failed(key: str, failure: Exception) -> Answer:
    """The answer to a request that raised `failure`."""
    return Answer(key, None, error_class=error_class(failure), error=str(failure))


def error_class(failure: Exception) -> str:
    """The error's class in the table `captions`: its own if it has one, else its type."""
    name = getattr(failure, "error_class", type(failure).__name__)
    # MemoryError, torch.OutOfMemoryError
    return "out_of_memory" if "Memory" in name else name
