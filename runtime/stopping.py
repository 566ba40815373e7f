"""Requests to stop a run: SIGTERM and SIGUSR1 (a scheduler's warning), Ctrl-C, a sweep that died.

A run that is asked to stop finishes its step, saves, and exits with `utils.EXIT_AGAIN`, or with 130
after Ctrl-C. A second Ctrl-C ends it at once.
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

# Environment variable with the process id of the sweep. Its runs stop when that process is gone.
PARENT = "LOCAL_ATTENTION_PARENT"
GONE = "the sweep is gone"
SECONDS_BETWEEN_LOOKS = 1.0

# After this, a run whose sweep is gone counts as hung.
SECONDS_TO_STOP = 300.0
# Where there is nothing to save, a long call into torch gets this long to return.
SECONDS_TO_ANSWER = 1.0


class StoppedAtOnce(BaseException):
    """Asked to stop where there is nothing to save.

    Not an Exception, so that code which tries things out and catches their failures lets it pass.
    """


class StopRequest:
    """Whether this process should stop, and why."""

    def __init__(self):
        self.reason: str | None = None
        self.by_keyboard = False
        self._may_raise = False
        self._over = threading.Event()

    @contextlib.contextmanager
    def listening(self, before_leaving: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Take signals as requests to stop, within the context.

        Outside the main thread Python has no signals, so there they are left alone.
        `before_leaving` is called if the process has to end in a long call, see `_leave_long_call`.
        """
        in_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) if in_main else ()
        previous = {number: signal.signal(number, self._receive) for number in numbers}
        if in_main:
            exit_codes.announce()

        if parent := os.environ.get(PARENT):
            threading.Thread(target=self._watch, args=(int(parent),), daemon=True).start()

        try:
            with self._heard_in_long_calls(before_leaving) if in_main else contextlib.nullcontext():
                yield
        finally:
            self._over.set()
            # Schedulers ask in several ways, and repeatedly; this must not interrupt the exit.
            asked_by_scheduler = self.reason is not None and not self.by_keyboard
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_IGN if asked_by_scheduler else handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Mark code with nothing to save: a request to stop ends it where it is.

        Raises StoppedAtOnce.
        """
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
            self.by_keyboard = True
            # The next Ctrl-C ends the process at once.
            signal.signal(signal.SIGINT, signal.default_int_handler)

        if self._may_raise:
            self._may_raise = False  # raise only once, as cleaning up may take a moment
            raise StoppedAtOnce

        if number == signal.SIGINT:
            with contextlib.suppress(OSError):  # in `2>&1 | tee log`, Ctrl-C has ended tee too
                os.write(2, b"stopping after this step; press Ctrl-C again to stop at once\n")

    @contextlib.contextmanager
    def _heard_in_long_calls(self, before_leaving: Callable[[], None]) -> Iterator[None]:
        """Hear of signals during a call into torch too, through a pipe that a thread reads.

        Python runs a signal handler only once the call has returned.
        """
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        previous = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        threading.Thread(
            target=self._leave_long_call, args=(read_end, before_leaving), daemon=True
        ).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous)
            os.close(write_end)

    def _leave_long_call(self, read_end: int, before_leaving: Callable[[], None]) -> None:
        """End the process if a scheduler asks it to stop and a long call holds up `at_once`."""
        with open(read_end, "rb", buffering=0) as signals:
            while received := signals.read(1):
                time.sleep(SECONDS_TO_ANSWER)
                # After Ctrl-C, it is up to the user to press it again.
                if self._may_raise and received[0] != signal.SIGINT:
                    self.reason = signal.Signals(received[0]).name
                    before_leaving()
                    exit_codes.exit_now(utils.EXIT_AGAIN)

    def _watch(self, parent: int) -> None:
        """Request a stop when the sweep is gone."""
        is_direct_child = os.getppid() == parent  # not if torchrun is in between
        while self.reason is None:
            try:
                os.kill(parent, 0)
            except OSError:
                self.reason = GONE
            if is_direct_child and os.getppid() != parent:
                self.reason = GONE
            time.sleep(SECONDS_BETWEEN_LOOKS)

        # If the run hangs, nobody is left to end it.
        if self.reason == GONE and not self._over.wait(SECONDS_TO_STOP):
            exit_codes.exit_now(utils.EXIT_AGAIN)
