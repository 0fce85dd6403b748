"""The queue in front of the model: order, bounds, cancellation, and its end."""

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from loragen_agents.server.work_queue import Job, QueueClosed, QueueFull, WorkQueue


async def given(job: Job) -> list[Any]:
    return [event async for event in job.events()]


def counting(*values: int) -> Any:
    return lambda cancel: iter(values)


class _Held:
    """Work that waits for `go`, and says when it has begun."""

    def __init__(self, value: int = 0) -> None:
        self.value, self.begun, self.go = value, threading.Event(), threading.Event()

    def __call__(self, cancel: threading.Event) -> Iterator[int]:
        self.begun.set()
        while not (self.go.wait(0.005) or cancel.is_set()):
            pass
        yield self.value


async def _begun(work: _Held) -> None:
    assert await asyncio.to_thread(work.begun.wait, 10)


@pytest.fixture
def queue() -> Iterator[WorkQueue]:
    queue = WorkQueue(workers=1, waiting=2)
    yield queue
    queue.close(1)


async def test_jobs_run_in_order_and_give_all_events(queue):
    jobs = [queue.submit(counting(*range(n, n + 3))) for n in range(2)]
    assert [await given(job) for job in jobs] == [[0, 1, 2], [1, 2, 3]]
    _until(lambda: queue.waiting == queue.running == 0)


async def test_what_a_job_raises_comes_to_who_reads_it(queue):
    def fails(cancel: threading.Event) -> Iterator[int]:
        yield 1
        raise KeyError("x")

    seen = []
    with pytest.raises(KeyError):
        async for event in queue.submit(fails).events():
            seen.append(event)
    assert seen == [1]
    assert await given(queue.submit(counting(5))) == [5]


async def test_no_more_wait_than_may(queue):
    held = _Held()
    first = queue.submit(held)
    await _begun(held)
    waiting = [queue.submit(counting(n)) for n in range(2)]
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        queue.submit(counting(9))
    # One that is cancelled while it waits makes room at once, and is never run.
    waiting[0].cancel()
    last = queue.submit(counting(7))
    held.go.set()
    assert [await given(job) for job in (first, waiting[1], last)] == [[0], [1], [7]]


async def test_an_idle_worker_takes_a_job_that_may_not_wait():
    queue = WorkQueue(workers=1, waiting=0)
    try:
        for n in range(20):
            assert await given(queue.submit(counting(n))) == [n]
            _until(lambda: queue.running == 0)
    finally:
        queue.close(1)


async def test_a_running_job_is_told_to_stop(queue):
    held = _Held()
    job = queue.submit(held)
    await _begun(held)
    job.cancel()
    await given(job)
    _until(lambda: queue.running == 0)


async def test_the_end_tells_everyone(queue):
    running, waiting = _Held(), _Held()
    jobs = [queue.submit(running), queue.submit(waiting)]
    await _begun(running)
    await asyncio.to_thread(queue.close, 5)
    with pytest.raises(QueueClosed):
        await given(jobs[1])
    assert not waiting.begun.is_set()
    assert jobs[0].cancelled
    with pytest.raises(QueueClosed):
        queue.submit(counting(1))


async def test_several_workers_run_side_by_side():
    queue = WorkQueue(workers=2)
    try:
        works = [_Held(n) for n in range(2)]
        jobs = [queue.submit(work) for work in works]
        for work in works:
            await _begun(work)
        for work in works:
            work.go.set()
        assert [await given(job) for job in jobs] == [[0], [1]]
    finally:
        queue.close(1)


def _until(condition: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
