"""Stopping a run from outside without losing work: the first signal asks, the second insists."""

import os
import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """While entered, remembers the first SIGINT, SIGTERM, SIGHUP or SIGBREAK; a second one ends the program at once."""

    def __init__(self, speaks: bool) -> None:
        """With `speaks`, a line on standard error says that the signal was heard."""
        self._speaks = speaks
        self.number: int | None = None
        """The signal that asked to stop, or None."""
        names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # the last but one is POSIX only, the last Windows only
        known = [getattr(signal, name) for name in names if hasattr(signal, name)]
        # nohup ignores SIGHUP so that the run outlives its terminal
        self._watched = [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self._previous = {number: signal.signal(number, self._remember) for number in self._watched}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        # written past Python's buffers, which the signal may have interrupted
        if self._speaks:
            os.write(2, b"\nStopping after this update ... (again to stop at once, without saving)\n")
