"""Python threads that take chunks of rows, and help with the chunks of others.

What a thread does between two products of BLAS is Python, a few microseconds; what it waits for is
the lock of one crew.  Sums over chunks have the same bits on any number of threads: whoever is done
first, they are added in their order.
"""

import _thread
import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import numpy as np

Task = Callable[[], object]


class _Stage:
    """Tasks that may be done in any order, by anybody."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self.tasks = deque(tasks)
        self.unfinished = len(self.tasks)


class Crew:
    """Hands out chunks of rows to so many owners; others help them, stage by stage."""

    def __init__(self, num_rows: int, chunk: int, owners: int, alone: bool) -> None:
        self._chunks = (
            slice(start, min(start + chunk, num_rows)) for start in range(0, num_rows, chunk)
        )
        self._unfinished = -(-num_rows // chunk)
        self._vacancies = owners
        self._alone = alone
        self._stages: list[_Stage] = []
        self._ends: dict[Hashable, int] = {}  # of what has been added to a sum so far
        self._changed = threading.Condition()
        self._stopped = False

    def chunks(self) -> Iterator[slice]:
        """Those of one owner; none for a thread that is one too many."""
        with self._changed:
            if not self._vacancies:
                return
            self._vacancies -= 1
        while True:
            with self._changed:
                rows = None if self._stopped else next(self._chunks, None)
            if rows is None:
                return
            yield rows
            with self._changed:
                self._unfinished -= 1
                self._changed.notify_all()

    def share(self, tasks: Iterable[Task]) -> None:
        """Do the tasks of a chunk, with those who have none; all are done then."""
        if self._alone:
            for task in tasks:
                task()
            return
        stage = _Stage(tasks)
        self._stages.append(stage)
        self._tell()
        while stage.tasks and not self._stopped:
            self._do_one([stage])
        self._wait_for(lambda: not stage.unfinished)
        self._stages.remove(stage)

    def help(self) -> None:
        """Do tasks of others until all chunks are finished."""
        while self._unfinished and not self._stopped:
            self._wait_for(
                lambda: not self._unfinished or any(stage.tasks for stage in self._stages)
            )
            self._do_one(self._stages.copy())

    def _do_one(self, stages: list[_Stage]) -> None:
        """One task of the first stage that has one left."""
        for stage in stages:
            with contextlib.suppress(IndexError):  # somebody was quicker
                task = stage.tasks.popleft()
                break
        else:
            return
        task()
        with self._changed:
            stage.unfinished -= 1
            if not stage.unfinished:
                self._changed.notify_all()

    def add_product(
        self,
        total: np.ndarray,
        left: np.ndarray,
        right: Any,
        key: Hashable,
        span: slice,
        onto: bool,
    ) -> None:
        """Add to a sum, when all that is before the span has been added.

        The first writes over what was there, unless the sum is `onto` it.
        """
        if not span.start and not onto:
            if isinstance(right, np.ndarray):
                np.matmul(left, right, out=total)
            else:
                total[...] = left @ right
        else:
            product = left @ right
            self._wait_for(lambda: self._ends.get(key, 0) == span.start)
            total += product
        self._ends[key] = span.stop
        self._tell()

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        if not self._alone:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or condition())

    def _tell(self) -> None:
        if not self._alone:
            with self._changed:
                self._changed.notify_all()

    def stop(self) -> None:
        """Hand out no more."""
        self._stopped = True

    def give_up(self) -> None:
        """And let nobody wait for what this thread will not do."""
        self.stop()
        self._tell()


def on_threads(threads: int, work: Task, crew: Crew) -> None:
    """Let so many threads work.

    This one, which Ctrl-C may interrupt anywhere, has no lock then that they wait for.  The pools
    of the standard library have such locks, and do not survive a fork.
    """
    if threads == 1:
        work()
        return
    started, finished = 0, []
    news: queue.SimpleQueue[None] = queue.SimpleQueue()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
            crew.give_up()
        finally:
            finished.append(True)
            news.put(None)

    def wait() -> None:
        while len(finished) < started:
            news.get()

    try:
        with contextlib.suppress(RuntimeError, MemoryError):  # no thread to be had: fewer do it
            while started < threads:
                _thread.start_new_thread(run, ())
                started += 1
        if not started:
            work()
        wait()
    except BaseException:
        crew.stop()
        wait()
        raise
    if errors:
        raise errors[0]
