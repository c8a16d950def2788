"""The calls of an interceptor, for tests that wait until it has done something."""

import asyncio
from collections import deque
from collections.abc import Generator
from typing import Any

_KEPT = 10_000
"""How many calls are kept; older ones are forgotten."""


class Calls:
    """The calls of one interceptor, from when it was set.

    It can be awaited, which returns it at once: `gate.to_server_drop()` acts without `await`, as in
    older versions of userver, and `await gate.to_server_drop()` is the same, as in newer ones.
    """

    def __init__(self) -> None:
        self._arguments: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self._came = asyncio.Event()

    def __await__(self) -> Generator[Any, None, "Calls"]:
        return self
        yield  # Makes this a generator.

    @property
    def times_called(self) -> int:
        """How many calls there were, without those that were taken or flushed."""
        return len(self._arguments)

    @property
    def has_calls(self) -> bool:
        """Whether there was a call that was not taken."""
        return bool(self._arguments)

    def flush(self) -> None:
        """Forget the calls so far."""
        self._arguments.clear()

    def next_call(self) -> dict[str, Any]:
        """Take the first call and return its arguments.

        Raises:
            LookupError: There is none.

        """
        if not self._arguments:
            raise LookupError("the interceptor was not called")
        return self._arguments.popleft()

    async def wait_call(self, timeout: float = 10.0) -> dict[str, Any]:
        """Wait for a call, take it and return its arguments.

        Raises:
            TimeoutError: There was none in `timeout` seconds.

        """
        try:
            await asyncio.wait_for(self._wait(), timeout)
        except asyncio.TimeoutError:
            raise TimeoutError(f"the interceptor was not called in {timeout} s") from None
        return self.next_call()

    async def _wait(self) -> None:
        while not self._arguments:
            self._came.clear()
            await self._came.wait()

    def record(self, **arguments: Any) -> None:  # noqa: ANN401
        """Add a call."""
        self._arguments.append(arguments)
        self._came.set()
