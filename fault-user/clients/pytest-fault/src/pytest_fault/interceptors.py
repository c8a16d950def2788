"""What a gate does with the data of one direction.

An interceptor reads from one socket and writes to another.
"""

import asyncio
import contextlib
import random
import re
import select
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any
from weakref import WeakKeyDictionary

EvLoop = Any
"""The event loop: asyncio's or uvloop's."""

Interceptor = Callable[[EvLoop, socket.socket, socket.socket], Coroutine[Any, Any, None]]
"""Called with the loop, the socket to read from and the one to write to, when there is data."""

CHUNK = 65_536
"""The most bytes that are read at once; no datagram is larger."""


class GateInterceptException(Exception):  # noqa: N818 (userver's name)
    """Raised by an interceptor to close its connection."""


async def send(loop: EvLoop, sink: socket.socket, data: bytes) -> None:
    """Send data, or an empty datagram."""
    if data:
        await loop.sock_sendall(sink, data)
        return
    # uvloop's sock_sendall sends no empty datagram.
    with contextlib.suppress(BlockingIOError):
        sink.send(data)


async def pass_on(loop: EvLoop, source: socket.socket, sink: socket.socket) -> None:
    """Pass data on as it is."""
    await send(loop, sink, await loop.sock_recv(source, CHUNK))


async def hold(_loop: EvLoop, _source: socket.socket, _sink: socket.socket) -> None:
    """Read nothing."""


async def drop(loop: EvLoop, source: socket.socket, _sink: socket.socket) -> None:
    """Read data and throw it away."""
    await loop.sock_recv(source, CHUNK)


async def close_on_data(loop: EvLoop, source: socket.socket, _sink: socket.socket) -> None:
    """Close the connection at its first byte."""
    await loop.sock_recv(source, 1)
    raise GateInterceptException("data came, which closes the connection")


async def corrupt(loop: EvLoop, source: socket.socket, sink: socket.socket) -> None:
    """Turn each zero byte into a one, and all others into zeros."""
    data = await loop.sock_recv(source, CHUNK)
    await send(loop, sink, bytes(byte == 0 for byte in data))


def delay(seconds: float) -> Interceptor:
    """Send each chunk this long after it was read."""
    _check(seconds >= 0, f"a delay is not negative: {seconds} s")

    async def intercept(loop: EvLoop, source: socket.socket, sink: socket.socket) -> None:
        data = await loop.sock_recv(source, CHUNK)
        await asyncio.sleep(seconds)
        await send(loop, sink, data)

    return intercept


def limit_rate(bytes_per_second: float) -> Interceptor:
    """Pass so many bytes a second, of all connections together."""
    _check(bytes_per_second >= 1, f"the rate is at least 1 byte/s: {bytes_per_second}")
    budget, updated = bytes_per_second, time.monotonic()

    async def intercept(loop: EvLoop, source: socket.socket, sink: socket.socket) -> None:
        nonlocal budget, updated
        now = time.monotonic()
        budget = min(bytes_per_second, budget + bytes_per_second * (now - updated))
        updated = now
        if budget < 1:
            await asyncio.sleep((1 - budget) / bytes_per_second)
            return
        data = await loop.sock_recv(source, min(int(budget), CHUNK))
        budget -= len(data)
        await send(loop, sink, data)

    return intercept


def limit_time(timeout: float, jitter: float) -> Interceptor:
    """Close a connection when data comes so long after its first data."""
    _check(timeout >= 0 and jitter >= 0, f"times are not negative: {timeout} s, {jitter} s")
    ends: WeakKeyDictionary[socket.socket, float] = WeakKeyDictionary()

    async def intercept(loop: EvLoop, source: socket.socket, sink: socket.socket) -> None:
        now = time.monotonic()
        if now >= ends.setdefault(source, now + timeout + jitter * random.random()):
            raise GateInterceptException("the connection's time is up")
        await pass_on(loop, source, sink)

    return intercept


def smaller_parts(max_size: int, seconds_per_part: float) -> Interceptor:
    """Pass data in parts of at most this size, each after a pause."""
    _check(max_size >= 1, f"a part has at least 1 byte: {max_size}")
    _check(seconds_per_part >= 0, f"a pause is not negative: {seconds_per_part} s")

    async def intercept(loop: EvLoop, source: socket.socket, sink: socket.socket) -> None:
        data = await loop.sock_recv(source, min(max_size, CHUNK))
        await asyncio.sleep(seconds_per_part)
        await send(loop, sink, data)

    return intercept


def concat(min_size: int) -> Interceptor:
    """Pass data on when there are so many bytes of it, or the stream has ended."""
    _check(0 <= min_size <= CHUNK, f"a size from 0 to {CHUNK}: {min_size}")

    async def intercept(loop: EvLoop, source: socket.socket, sink: socket.socket) -> None:
        if len(source.recv(CHUNK, socket.MSG_PEEK)) >= min_size or _has_ended(source):
            await pass_on(loop, source, sink)

    return intercept


def limit_bytes(limit: int, close_all: Callable[[], Awaitable[None]]) -> Interceptor:
    """Pass so many bytes of all connections together; then close them all and begin anew."""
    _check(limit >= 0, f"a limit is not negative: {limit}")
    left = limit

    async def intercept(loop: EvLoop, source: socket.socket, sink: socket.socket) -> None:
        nonlocal left
        data = await loop.sock_recv(source, CHUNK)
        if left > len(data):
            left -= len(data)
            await send(loop, sink, data)
            return
        last, left = data[:left], limit
        if last:
            await send(loop, sink, last)
        await close_all()

    return intercept


def substitute(pattern: str, repl: str) -> Interceptor:
    """Replace what matches in each chunk; chunks that are not UTF-8 pass as they are."""
    expression = re.compile(pattern)

    async def intercept(loop: EvLoop, source: socket.socket, sink: socket.socket) -> None:
        data = await loop.sock_recv(source, CHUNK)
        try:
            data = expression.sub(repl, data.decode()).encode()
        except UnicodeError:
            pass  # No text: it passes as it is.
        await send(loop, sink, data)

    return intercept


def _has_ended(source: socket.socket) -> bool:
    poll = select.poll()
    poll.register(source, select.POLLRDHUP)
    return bool(poll.poll(0))


def _check(is_right: bool, message: str) -> None:
    if not is_right:
        raise ValueError(message)
