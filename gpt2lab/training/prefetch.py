"""The next batch is made ready while the present one trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
AHEAD = 2


def prefetched(make: Callable[[int], T], span: range) -> Iterator[T]:
    """`make(i)` for every i of `span` in order, each made in a thread of its own while those before it are used.

    What `make` raises is raised where its value would have come.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        coming: deque[Future[T]] = deque(thread.submit(make, i) for i in span[:AHEAD])
        for i in span:
            if i + AHEAD in span:
                coming.append(thread.submit(make, i + AHEAD))
            yield coming.popleft().result()
