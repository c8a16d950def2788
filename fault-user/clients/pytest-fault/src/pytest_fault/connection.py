"""A connection through a gate: the tasks that move its data, and its sockets."""

import asyncio
import logging
import socket
import struct
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from pytest_fault.calls import Calls
from pytest_fault.interceptors import EvLoop, GateInterceptException, Interceptor, pass_on

logger = logging.getLogger(__name__)

_HELD = 0.01
"""How many seconds an interceptor that reads nothing waits until it is called again."""


class GateException(Exception):  # noqa: N818 (userver's name)
    """The gate can't be used."""


class Tap(socket.socket):
    """A non-blocking socket that counts how often something was read from it."""

    def __init__(self, taken: socket.socket) -> None:
        super().__init__(fileno=taken.detach())
        self.setblocking(False)
        self.reads = 0

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """Read, or peek, which does not count."""
        data = super().recv(size, flags)
        self._count(flags)
        return data

    def recv_into(self, *arguments: Any, **named: Any) -> int:  # noqa: ANN401
        """Read into a buffer."""
        size = super().recv_into(*arguments, **named)
        self._count(0)
        return size

    def recvfrom(self, size: int, flags: int = 0, /) -> tuple[bytes, Any]:
        """Read with the sender's address, or peek."""
        answer = super().recvfrom(size, flags)
        self._count(flags)
        return answer

    def _count(self, flags: int) -> None:
        self.reads += not flags & socket.MSG_PEEK


class Direction:
    """The interceptor of one direction, for all connections of a gate."""

    def __init__(self) -> None:
        self.interceptor: Interceptor = pass_on
        self.calls = Calls()
        self._changed = asyncio.Event()

    def set(self, interceptor: Interceptor) -> Calls:
        """Replace the interceptor; one that is at work ends its work first."""
        self.interceptor = interceptor
        self.calls = Calls()
        self._changed.set()
        self._changed = asyncio.Event()
        return self.calls

    async def changed(self, within: float) -> None:
        """Wait until the interceptor is replaced, or so many seconds."""
        try:
            await asyncio.wait_for(self._changed.wait(), within)
        except asyncio.TimeoutError:
            pass  # It is called again.


async def readable(loop: EvLoop, sock: socket.socket) -> None:
    """Wait until there is data, the end of a stream, or an error to read."""
    future = loop.create_future()
    loop.add_reader(sock.fileno(), lambda: future.done() or future.set_result(None))
    try:
        await future
    finally:
        loop.remove_reader(sock.fileno())


async def pump(loop: EvLoop, direction: Direction, source: Tap, sink: Tap) -> None:
    """Call the direction's interceptor whenever there is data, until the end of the stream."""
    held: Calls | None = None
    while True:
        await readable(loop, source)
        if _is_at_end(source):
            sink.shutdown(socket.SHUT_WR)
            return
        interceptor, calls, before = direction.interceptor, direction.calls, source.reads
        try:
            await interceptor(loop, source, sink)
        finally:
            if source.reads != before or calls is not held:
                calls.record(loop=loop, socket_from=source, socket_to=sink)
        held = None
        if source.reads == before:
            held = calls
            await direction.changed(_HELD)


def _is_at_end(source: Tap) -> bool:
    try:
        return source.type == socket.SOCK_STREAM and source.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False


class Connection:
    """Runs the tasks of a connection; when one fails or all have ended it closes the sockets."""

    def __init__(
        self,
        name: str,
        tasks: Iterable[Coroutine[Any, Any, None]],
        sockets: Iterable[socket.socket],
        forget: Callable[["Connection"], None],
    ) -> None:
        self._name = name
        self._parts = [asyncio.ensure_future(task) for task in tasks]
        self._sockets = list(sockets)
        self._forget = forget
        self.task = asyncio.ensure_future(self._run())

    def info(self) -> str:
        """Return the numbers of its sockets."""
        return " <=> ".join(f"fd={sock.fileno()}" for sock in self._sockets)

    async def _run(self) -> None:
        try:
            await asyncio.gather(*self._parts)
        except GateInterceptException as reason:
            logger.info('"%s": %s', self._name, reason)
        except OSError as error:
            logger.info('"%s": a connection was broken: %s', self._name, error)
            self._pass_on_the_reset()
        except Exception:
            logger.exception('"%s": an interceptor failed, which closes the connection', self._name)
        finally:
            await self._end()

    async def _end(self) -> None:
        try:
            for part in self._parts:
                part.cancel()
            # Sockets are closed when nothing waits for them any more.
            await asyncio.wait(self._parts)
        finally:
            for sock in self._sockets:
                sock.close()
            self._forget(self)

    def _pass_on_the_reset(self) -> None:
        for sock in self._sockets:
            if sock.family != socket.AF_UNIX and sock.type == socket.SOCK_STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
