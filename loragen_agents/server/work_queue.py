"""A bounded queue of requests, and the threads that work on them. Knows neither HTTP nor models.

A `Job` is made on the event loop and run in a worker's thread; what it yields comes back to the loop one by one. A job
that is cancelled while it waits leaves the queue at once, one that runs is told to stop.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

logger = logging.getLogger(__name__)

Run = Callable[[threading.Event], Iterator[Any]]


class QueueFull(Exception):
    """No more jobs can wait."""


class QueueClosed(Exception):
    """The queue takes no more jobs: the server is stopping."""


class _End:
    """What closes a job's events. error: why it did not end by itself."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Job:
    """Work that waits or runs, and what it has given so far. Make it on the event loop that reads it.

    Args:
        run: called in a worker's thread with the event that asks it to stop; yields what is passed on.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._cancel = threading.Event()
        self.submitted = time.perf_counter()
        self.wait_seconds = 0.0

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._cancel.is_set()

    def cancel(self) -> None:
        """Ask it to stop; what it still gives goes nowhere."""
        self._cancel.set()

    async def events(self) -> AsyncIterator[Any]:
        """What the job yields, as it comes.

        Raises:
            QueueClosed: the server stopped before the job was done.
            Exception: whatever the job itself raised.
        """
        while not isinstance(event := await self._events.get(), _End):
            yield event
        if event.error is not None:
            raise event.error

    def _work(self) -> None:
        self.wait_seconds = time.perf_counter() - self.submitted
        error: BaseException | None = None
        try:
            for event in self._run(self._cancel):
                self._give(event)
                if self.cancelled:
                    break
        except Exception as failure:
            error = failure
        self._give(_End(error))

    def _give(self, event: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody is left to hear of it
            self._cancel.set()


class WorkQueue:
    """Runs jobs in the order of their arrival.

    Args:
        workers: jobs that run at the same time.
        waiting: jobs that may wait beyond those that run.
    """

    def __init__(self, workers: int = 1, waiting: int = 64) -> None:
        self.limit = waiting
        self._jobs: deque[Job] = deque()
        self._idle = workers
        self._changed = threading.Condition()
        self._closed = False
        self._running: set[Job] = set()
        self._threads = [
            threading.Thread(target=self._serve, name=f"loragen-worker-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that no worker has begun."""
        with self._changed:
            return len(self._jobs)

    @property
    def running(self) -> int:
        """Jobs that are worked on."""
        with self._changed:
            return len(self._running)

    def submit(self, run: Run) -> Job:
        """Queue a job. Call it on the event loop that will read the job's events.

        Raises:
            QueueFull: as many jobs wait as may.
            QueueClosed: the queue is closed.
        """
        with self._changed:
            if self._closed:
                raise QueueClosed("the server is stopping")
            self._drop_cancelled()
            if len(self._jobs) >= self.limit + self._idle:
                raise QueueFull(f"{len(self._jobs)} requests are waiting")
            job = Job(run)
            self._jobs.append(job)
            self._changed.notify()
            return job

    def close(self, seconds: float = 10.0) -> None:
        """Take no more jobs, tell those that wait so, ask those that run to stop, and wait for the workers."""
        with self._changed:
            self._closed = True
            left, self._jobs = list(self._jobs), deque()
            running = list(self._running)
            self._changed.notify_all()
        for job in left:
            job._give(_End(QueueClosed("the server is stopping")))
        for job in running:
            job.cancel()
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.warning("A request did not stop within %g seconds; it ends with the process.", seconds)

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                job = self._jobs.popleft()
                if job.cancelled:
                    continue
                self._idle -= 1
                self._running.add(job)
            try:
                job._work()
            finally:
                with self._changed:
                    self._idle += 1
                    self._running.discard(job)

    def _drop_cancelled(self) -> None:
        if any(job.cancelled for job in self._jobs):
            self._jobs = deque(job for job in self._jobs if not job.cancelled)
