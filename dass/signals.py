"""Ctrl-C and SIGTERM as a wish that the training loop grants at the end of a step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StopRequest:
    """True once a stop was asked for."""

    def __init__(self) -> None:
        self.made = False

    def __bool__(self) -> bool:
        return self.made


@contextmanager
def stop_on_signals(enabled: bool = True) -> Iterator[StopRequest]:
    """Within, the first SIGINT or SIGTERM sets the request that is yielded; the second acts as ever.

    Outside the main thread signals cannot be taken over; there, and when not enabled, nothing is changed.
    """
    request = StopRequest()
    previous: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        request.made = True
        signal.signal(number, previous[number])

    try:
        if enabled:
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.signal(number, note)
    except ValueError:
        pass
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
