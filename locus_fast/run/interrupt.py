"""Ctrl-C as a request: the run ends in order, and whoever pressed the key is told at once what will be saved
and when."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupt:
    """While its block lasts, the first Ctrl-C asks for an orderly end and says what that will be, the second
    reports on it, and every further one raises KeyboardInterrupt. Calling it tells whether an end was asked
    for.

    promise: what the first Ctrl-C says; whoever works keeps it true as the work goes on.
    """

    def __init__(self, promise: str = "it ends after the work at hand, and there is nothing to save") -> None:
        self.count = 0
        self.promise = promise
        self.saving_promise: str | None = None  # while something is being written

    @property
    def requested(self) -> bool:
        return self.count > 0

    def __call__(self) -> bool:
        return self.requested

    def __enter__(self) -> Interrupt:
        self.previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.previous)

    @contextmanager
    def saving(self, what: str, then: str = "it ends") -> Iterator[None]:
        """The block writes `what`, which a first or a second Ctrl-C lets it finish. then: what follows."""
        self.saving_promise = f"{what} is being saved and is finished first; then {then}"
        try:
            yield
        finally:
            self.saving_promise = None

    def _ask(self, *_: object) -> None:
        self.count += 1
        if self.count > 2:
            raise KeyboardInterrupt
        if self.count == 1:
            _say(f"\nCtrl-C: {self.saving_promise or self.promise}.\n")
        else:
            last = "A third one ends it at once, and what is not saved is lost."
            _say(f"\nCtrl-C again: {self.saving_promise or 'it is ending as said'}. {last}\n")


def _say(text: str) -> None:
    """To standard error past Python's buffers: a signal may arrive in the middle of a write to them, and they
    cannot be entered twice."""
    os.write(2, text.encode())
