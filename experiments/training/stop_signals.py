"""Signals that ask a training run to stop."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | int

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[list[int]]:
    """Yield a list that gets the numbers of stop signals; a second signal takes effect at once.

    Outside the main thread no signal is caught.
    """
    caught_signals: list[int] = []
    previous_handlers: dict[int, Handler] = {}

    def record_signal(number: int, frame: FrameType | None) -> None:
        caught_signals.append(number)
        signal.signal(number, previous_handlers[number])  # for a second one

    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            previous_handlers[int(number)] = signal.getsignal(number) or signal.SIG_DFL
            signal.signal(number, record_signal)
    try:
        yield caught_signals
    finally:
        for signal_number, handler in previous_handlers.items():
            signal.signal(signal_number, handler)
