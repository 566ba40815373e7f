"""Many image files at a time: threads, a progress bar, and the remarks of C libraries hidden."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from pipeline.decoding import UnreadableError

CHUNK = 8  # files that a thread takes at a time

# Only one reader at a time may redirect stderr; a second one would save, and later restore, the
# first one's replacement.
STDERR_LOCK = threading.Lock()


def attempt(
    function: Callable,
    paths: list[Path],
    title: str,
    unreadable: dict[Path, UnreadableError],
    stream: TextIO,
) -> list:
    """`function` of every path; None for those that fail, which are added to `unreadable`."""

    def of_one(path):
        try:
            return function(path)
        except UnreadableError as error:
            unreadable[path] = error
            return None

    return map_with_bar(of_one, paths, title, stream)


def map_with_bar(function: Callable, items, title: str, stream: TextIO) -> list:
    """`function` of every item, in threads, as decoding releases the GIL.

    Threads take items in chunks. Handing over small images one by one would cost more time waiting
    for the GIL than the images take.
    """
    chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
    is_hidden = not stream.isatty()
    stopping = threading.Event()
    results = []

    def work(chunk) -> list:
        return [function(item) for item in chunk if not stopping.is_set()]

    with (
        ThreadPoolExecutor(num_threads()) as pool,
        tqdm(desc=title, total=len(items), leave=False, disable=is_hidden, file=stream) as bar,
    ):
        try:
            for done in pool.map(work, chunks):
                results += done
                bar.update(len(done))
        except BaseException:  # including Ctrl-C; the pool would read all other files first
            stopping.set()
            pool.shutdown(cancel_futures=True)
            raise
    return results


def num_threads() -> int:
    return min(16, os.cpu_count() or 1)


@contextlib.contextmanager
def quiet_libraries(has_tiff: bool) -> Iterator[TextIO]:
    """If there are TIFFs, hide what C libraries write to stderr; yields a stream to the real one.

    About the pixels of odd files libtiff prints remarks of its own, next to the error that names
    the file.
    """
    with STDERR_LOCK if has_tiff else contextlib.nullcontext():
        try:
            descriptor = os.dup(2) if has_tiff else None
        except OSError:  # stderr is closed
            descriptor = None
        if descriptor is None:
            yield sys.stderr
            return

        with (
            open(descriptor, "w", errors="backslashreplace") as stream,
            open(os.devnull, "w") as nowhere,
        ):
            sys.stderr.flush()
            try:
                os.dup2(nowhere.fileno(), 2)
                yield stream
            finally:
                stream.flush()
                os.dup2(descriptor, 2)
