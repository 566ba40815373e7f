"""Being asked to stop: SIGTERM and SIGUSR1 (schedulers' warnings), Ctrl-C, a parent that has died.

A run that is asked to stop finishes its step, saves, and exits with `utils.EXIT_AGAIN`, or 130 after Ctrl-C; a second
Ctrl-C ends it at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import utils
from runtime import exit_codes

# The sweep's process, told to its runs: they stop when it is gone.
PARENT = "LOCAL_ATTENTION_PARENT"
SECONDS_BETWEEN_LOOKS = 1.0
GONE = "the sweep is gone"
SECONDS_TO_STOP = 300.0  # then it is taken for hung
SECONDS_TO_ANSWER = 1.0  # where there is nothing to save; then a long call of torch is not waited for


class StoppedAtOnce(BaseException):
    """Asked to stop where there is nothing to save. No Exception: whoever tries things out must not swallow it."""


class StopRequest:
    """Whether and why this process should stop."""

    def __init__(self):
        self.reason: str | None = None
        self.by_keyboard = False
        self._may_raise = False
        self._over = threading.Event()

    @contextlib.contextmanager
    def listening(self, before_leaving: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Within, signals are requests; not in a thread, where Python has no signals: they are left to the main one.

        `before_leaving` is called if the process must end from within a long call, see `_end_where_it_is`.
        """
        in_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) if in_main else ()
        before = {number: signal.signal(number, self._receive) for number in numbers}
        if in_main:
            exit_codes.announce()
        if parent := os.environ.get(PARENT):
            threading.Thread(target=self._watch, args=(int(parent),), daemon=True).start()
        try:
            with self._heard_in_long_calls(before_leaving) if in_main else contextlib.nullcontext():
                yield
        finally:
            self._over.set()
            asked = self.reason is not None and not self.by_keyboard  # schedulers ask by several ways, and again
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if asked else handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, there is nothing to save: a request ends it where it is. Raises StoppedAtOnce."""
        self._may_raise = True
        try:
            if self.reason is not None:
                raise StoppedAtOnce
            yield
        finally:
            self._may_raise = False

    def _receive(self, number: int, frame) -> None:
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # once more ends it at once
            self.by_keyboard = True
        if self._may_raise:
            self._may_raise = False  # once: what ends may take a moment
            raise StoppedAtOnce
        if number == signal.SIGINT:
            with contextlib.suppress(OSError):  # in `2>&1 | tee log` Ctrl-C has ended tee as well
                os.write(2, b"stopping after this step; Ctrl-C once more stops at once\n")

    @contextlib.contextmanager
    def _heard_in_long_calls(self, before_leaving: Callable[[], None]) -> Iterator[None]:
        """Python calls no handler while torch computes; a thread hears of signals all the same, by a pipe."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._end_where_it_is, args=(read_end, before_leaving), daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(write_end)

    def _end_where_it_is(self, read_end: int, before_leaving: Callable[[], None]) -> None:
        """End the process that a scheduler has asked to stop, if `at_once` is kept waiting by a long call."""
        with open(read_end, "rb", buffering=0) as signals:
            while received := signals.read(1):
                time.sleep(SECONDS_TO_ANSWER)
                if self._may_raise and received[0] != signal.SIGINT:  # a second Ctrl-C is the user's to give
                    self.reason = signal.Signals(received[0]).name
                    before_leaving()
                    exit_codes.exit_now(utils.EXIT_AGAIN)

    def _watch(self, parent: int) -> None:
        is_ours = os.getppid() == parent  # else torchrun is between
        while self.reason is None:
            try:
                os.kill(parent, 0)
            except OSError:
                self.reason = GONE
            if is_ours and os.getppid() != parent:
                self.reason = GONE
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if self.reason == GONE and not self._over.wait(SECONDS_TO_STOP):  # it hangs, and nobody is left to end it
            exit_codes.exit_now(utils.EXIT_AGAIN)
