"""The gates, between sockets of the test."""

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from pytest_fault import chaos

BOTH = pytest.mark.parametrize("direction", ["to_server", "to_client"])
NEVER = 0.2
"""How many seconds a test looks at what must not happen. A slow machine makes it no failure."""


def fresh(kind: socket.SocketKind) -> socket.socket:
    """Return a non-blocking socket."""
    sock = socket.socket(socket.AF_INET, kind)
    sock.setblocking(False)
    return sock


async def receive(sock: socket.socket, size: int) -> bytes:
    """Read exactly so many bytes."""
    data = b""
    while len(data) < size:
        more = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
        assert more, f"the stream ended after {data!r}"
        data += more
    return data


async def send(sock: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, data)


async def ends(sock: socket.socket) -> bool:
    """Wait for data or an end; whether it is an end."""
    try:
        return await asyncio.get_running_loop().sock_recv(sock, 65_536) == b""
    except ConnectionError:
        return True


async def is_silent(sock: socket.socket) -> bool:
    try:
        await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 1), NEVER)
    except asyncio.TimeoutError:
        return True
    return False


class Tcp:
    """A server, and a gate in front of it."""

    def __init__(self, gate: chaos.TcpGate, listening: socket.socket) -> None:
        self.gate, self._listening = gate, listening

    async def connect(self) -> tuple[socket.socket, socket.socket]:
        """Open a connection; the client's end and the server's."""
        loop = asyncio.get_running_loop()
        client = fresh(socket.SOCK_STREAM)
        await loop.sock_connect(client, self.gate.get_sockname_for_clients())
        server, _ = await loop.sock_accept(self._listening)
        return client, server


@contextlib.asynccontextmanager
async def tcp() -> AsyncIterator[Tcp]:
    with fresh(socket.SOCK_STREAM) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        route = chaos.GateRoute("tcp", "127.0.0.1", listening.getsockname()[1])
        async with chaos.TcpGate(route, asyncio.get_running_loop()) as gate:
            yield Tcp(gate, listening)


def on(gate: chaos.BaseGate, direction: str, name: str) -> Callable[..., chaos.Calls]:
    """Return a method of a gate."""
    method: Callable[..., chaos.Calls] = getattr(gate, f"{direction}_{name}")
    return method


def along(direction: str, client: socket.socket, server: socket.socket) -> tuple[Any, Any]:
    """Return the sockets that a direction's data is sent to and read from."""
    return (client, server) if direction == "to_server" else (server, client)


async def passes(source: socket.socket, sink: socket.socket, data: bytes = b"ping") -> None:
    await send(source, data)
    assert await receive(sink, len(data)) == data


async def test_data_passes_and_connections_are_counted() -> None:
    async with tcp() as world:
        gate = world.gate
        assert gate.connections_count() == 0
        waiting = asyncio.ensure_future(gate.wait_for_connections(count=2))
        client, server = await world.connect()
        await passes(client, server)
        await passes(server, client, b"x" * 500_000)
        assert not waiting.done()
        second, _ = await world.connect()
        await waiting
        assert gate.connections_count() == 2
        assert gate.info().count("fd=") == 4
        with pytest.raises(asyncio.TimeoutError):
            await gate.wait_for_connections(count=3, timeout=0.01)
        await gate.sockets_close(count=1)
        assert gate.connections_count() == 1
        assert await ends(client)
        assert await ends(server)
        await gate.sockets_close()
        assert gate.connections_count() == 0
        assert await ends(second)
    assert "no active sockets" in gate.info()


@BOTH
async def test_noop_reads_nothing_and_loses_nothing(direction: str) -> None:
    async with tcp() as world:
        client, server = await world.connect()
        source, sink = along(direction, client, server)
        calls = on(world.gate, direction, "noop")()
        await send(source, b"held")
        await calls.wait_call()
        await passes(sink, source)
        assert await is_silent(sink)
        assert calls.times_called == 0, "a call for data, not for each look at it"
        on(world.gate, direction, "pass")()
        assert await receive(sink, 4) == b"held"


@BOTH
async def test_drop_loses_data(direction: str) -> None:
    async with tcp() as world:
        source, sink = along(direction, *await world.connect())
        calls = await on(world.gate, direction, "drop")()
        await send(source, b"lost")
        call = await calls.wait_call()
        assert isinstance(call["socket_from"], socket.socket)
        await on(world.gate, direction, "pass")()
        await passes(source, sink)


@BOTH
async def test_delay(direction: str) -> None:
    async with tcp() as world:
        source, sink = along(direction, *await world.connect())
        await passes(sink, source)
        await on(world.gate, direction, "delay")(0.3)
        start = time.monotonic()
        await passes(source, sink)
        assert time.monotonic() - start >= 0.29


@BOTH
async def test_close_on_data(direction: str) -> None:
    async with tcp() as world:
        source, sink = along(direction, *await world.connect())
        other = along(direction, *await world.connect())
        on(world.gate, direction, "close_on_data")()
        await passes(sink, source)
        await send(source, b"end")
        assert await ends(sink)
        assert await ends(source)
        on(world.gate, direction, "pass")()
        await passes(*other)


@BOTH
async def test_corrupt_data(direction: str) -> None:
    async with tcp() as world:
        source, sink = along(direction, *await world.connect())
        on(world.gate, direction, "corrupt_data")()
        await send(source, b"a\0b")
        assert await receive(sink, 3) == b"\0\1\0"


@BOTH
async def test_limit_bps(direction: str) -> None:
    async with tcp() as world:
        source, sink = along(direction, *await world.connect())
        on(world.gate, direction, "limit_bps")(10)
        start = time.monotonic()
        await passes(source, sink, b"first ten + 3")
        assert time.monotonic() - start >= 0.29
        with pytest.raises(ValueError, match="at least 1"):
            on(world.gate, direction, "limit_bps")(0.5)


@BOTH
async def test_limit_time_closes_when_data_comes_later(direction: str) -> None:
    async with tcp() as world:
        source, sink = along(direction, *await world.connect())
        other = along(direction, *await world.connect())
        calls = on(world.gate, direction, "limit_time")(0.2, jitter=0.0)
        await send(source, b"a")
        while not await _gone(source, sink, calls):
            await send(source, b"a")
        assert world.gate.connections_count() == 1
        await passes(*other)


async def _gone(source: socket.socket, sink: socket.socket, calls: chaos.Calls) -> bool:
    """Wait for the interceptor; whether the connection has ended."""
    await calls.wait_call()
    if not await ends(sink):
        return False
    assert await ends(source)
    return True


@BOTH
async def test_smaller_parts(direction: str) -> None:
    async with tcp() as world:
        source, sink = along(direction, *await world.connect())
        calls = on(world.gate, direction, "smaller_parts")(2, sleep_per_packet=0.1)
        start = time.monotonic()
        await passes(source, sink, b"hello")
        assert time.monotonic() - start >= 0.29
        for _ in range(3):
            await calls.wait_call()
        assert not calls.has_calls


@BOTH
async def test_concat_packets(direction: str) -> None:
    async with tcp() as world:
        client, server = await world.connect()
        source, sink = along(direction, client, server)
        calls = on(world.gate, direction, "concat_packets")(10)
        await send(source, b"hello")
        await calls.wait_call()
        assert await is_silent(sink)
        await send(source, b"world")
        assert await receive(sink, 10) == b"helloworld"
        await send(source, b"rest")
        source.shutdown(socket.SHUT_WR)
        assert await receive(sink, 4) == b"rest", "the end of the stream brings the rest"


@BOTH
async def test_limit_bytes_counts_all_connections_and_begins_anew(direction: str) -> None:
    async with tcp() as world:
        first = along(direction, *await world.connect())
        second = along(direction, *await world.connect())
        on(world.gate, direction, "limit_bytes")(12)
        await passes(*first, b"hello")
        await passes(*second, b"die now")
        for sock in (*first, *second):
            assert await ends(sock)
        third = along(direction, *await world.connect())
        await passes(*third, b"hello again!")
        assert await ends(third[1])


@BOTH
async def test_substitute(direction: str) -> None:
    async with tcp() as world:
        source, sink = along(direction, *await world.connect())
        on(world.gate, direction, "substitute")("h(.)llo", r"d\1e")
        await send(source, b"hello")
        assert await receive(sink, 3) == b"dee"
        await passes(source, sink, b"\xff\xfe")


@BOTH
async def test_an_interceptor_of_the_tests(direction: str) -> None:
    async def twice(loop: chaos.EvLoop, source: socket.socket, sink: socket.socket) -> None:
        data = await loop.sock_recv(source, 10)
        await loop.sock_sendall(sink, data * 2)

    async def fails(loop: chaos.EvLoop, source: socket.socket, sink: socket.socket) -> None:
        raise LookupError("in the test's interceptor")

    async with tcp() as world:
        source, sink = along(direction, *await world.connect())
        gate = world.gate
        set_to = getattr(gate, f"set_{direction}_interceptor")
        await set_to(twice)
        await send(source, b"ab")
        assert await receive(sink, 4) == b"abab"
        set_to(fails)
        await send(source, b"ab")
        assert await ends(sink)


async def test_stop_accepting_leaves_clients_unserved_and_open_connections_alone() -> None:
    async with tcp() as world:
        gate = world.gate
        old = await world.connect()
        await gate.stop_accepting()
        await passes(*old)
        client = fresh(socket.SOCK_STREAM)
        await asyncio.get_running_loop().sock_connect(client, gate.get_sockname_for_clients())
        assert await is_silent(client)
        assert gate.connections_count() == 1
        gate.start_accepting()
        gate.start_accepting()
        await gate.wait_for_connections(count=2)


async def test_stop_and_start_keep_the_port() -> None:
    async with tcp() as world:
        gate = world.gate
        client, server = await world.connect()
        address = gate.get_sockname_for_clients()
        await gate.to_server_drop()
        await gate.stop()
        await gate.stop()
        assert await ends(client)
        assert await ends(server)
        with pytest.raises(ConnectionRefusedError):
            await world.connect()
        with pytest.raises(chaos.GateException):
            gate.start_accepting()
        gate.start()
        gate.start()
        assert gate.get_sockname_for_clients() == address
        await passes(*await world.connect())


async def test_ends_and_resets_stay_what_they_are() -> None:
    async with tcp() as world:
        client, server = await world.connect()
        client.shutdown(socket.SHUT_WR)
        assert await ends(server)
        await passes(server, client, b"after the half-close")
        server.close()
        assert await ends(client)
        client, server = await world.connect()
        await passes(client, server)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        with pytest.raises(ConnectionResetError):
            await asyncio.get_running_loop().sock_recv(server, 1)


async def test_a_server_that_is_not_there_closes_the_client() -> None:
    with fresh(socket.SOCK_STREAM) as unused:
        unused.bind(("127.0.0.1", 0))
        route = chaos.GateRoute("tcp", "127.0.0.1", unused.getsockname()[1])
        async with chaos.TcpGate(route) as gate:
            client = fresh(socket.SOCK_STREAM)
            await asyncio.get_running_loop().sock_connect(client, gate.get_sockname_for_clients())
            assert await ends(client)


async def test_mistakes() -> None:
    gate = chaos.TcpGate(chaos.GateRoute("tcp", "127.0.0.1", 1, "127.0.0.1", 0))
    with pytest.raises(chaos.GateException, match="not started"):
        gate.get_sockname_for_clients()
    wrong = chaos.TcpGate(chaos.GateRoute("tcp", "127.0.0.1", 1, "no such host.invalid", 0))
    with pytest.raises(chaos.GateException, match="can't resolve"):
        wrong.start()
    async with tcp() as world:
        used = world.gate.get_sockname_for_clients()[1]
        second = chaos.TcpGate(chaos.GateRoute("tcp", "127.0.0.1", 1, "127.0.0.1", used))
        with pytest.raises(chaos.GateException, match="can't listen"):
            second.start()
        with pytest.raises(LookupError):
            world.gate.to_server_pass().next_call()
        with pytest.raises(TimeoutError):
            await world.gate.to_server_pass().wait_call(timeout=0.01)


async def test_localhost_has_one_port_on_all_its_addresses() -> None:
    async with chaos.TcpGate(chaos.GateRoute("tcp", "127.0.0.1", 1, "localhost", 0)) as gate:
        _, port = gate.get_sockname_for_clients()
        for family, *_, address in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM):
            with socket.socket(family, socket.SOCK_STREAM) as client:
                client.connect(address)


class Udp:
    """A server, and a gate in front of it."""

    def __init__(self, gate: chaos.UdpGate, server: socket.socket) -> None:
        self.gate, self._server = gate, server

    async def connect(self) -> tuple[socket.socket, socket.socket]:
        """Send a datagram; the client's socket, and one of the server that answers this client."""
        loop = asyncio.get_running_loop()
        client = fresh(socket.SOCK_DGRAM)
        await loop.sock_connect(client, self.gate.get_sockname_for_clients())
        await send(client, b"hi")
        await readable(self._server)
        data, address = self._server.recvfrom(3)
        assert data == b"hi"
        # Answers of a connected socket, and the gate's datagrams to it.
        server = fresh(socket.SOCK_DGRAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(self._server.getsockname())
        await loop.sock_connect(server, address)
        return client, server


async def readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    loop.add_reader(sock, future.set_result, None)
    await future
    loop.remove_reader(sock)


@contextlib.asynccontextmanager
async def udp() -> AsyncIterator[Udp]:
    with fresh(socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        route = chaos.GateRoute("udp", "127.0.0.1", server.getsockname()[1])
        async with chaos.UdpGate(route) as gate:
            yield Udp(gate, server)


async def datagram(sock: socket.socket) -> bytes:
    data: bytes = await asyncio.get_running_loop().sock_recv(sock, 65_536)
    return data


async def test_each_udp_client_has_its_own_answers() -> None:
    async with udp() as world:
        assert not world.gate.is_connected()
        first, second = await world.connect(), await world.connect()
        assert world.gate.is_connected()
        for client, server in (first, second):
            await send(server, b"answer")
            assert await datagram(client) == b"answer"
            await send(client, b"x" * 60_000)
            assert await datagram(server) == b"x" * 60_000
            client.send(b"")
            assert await datagram(server) == b""
        await world.gate.sockets_close()
        assert not world.gate.is_connected()
        assert not hasattr(world.gate, "wait_for_connections")


@BOTH
async def test_udp_datagrams_stay_whole_and_in_order_when_held(direction: str) -> None:
    async with udp() as world:
        source, sink = along(direction, *await world.connect())
        calls = await on(world.gate, direction, "noop")()
        for number in range(100):
            await send(source, b"message %d" % number)
        await calls.wait_call()
        assert await is_silent(sink)
        await passes(sink, source, b"the other direction")
        await on(world.gate, direction, "pass")()
        for number in range(100):
            assert await datagram(sink) == b"message %d" % number


def _late() -> list[tuple[str, tuple[Any, ...], bytes | None]]:
    """Return methods with what becomes of a datagram `hello`; `None` for nothing."""
    return [
        ("drop", (), None),
        ("close_on_data", (), None),
        ("limit_bytes", (3,), b"hel"),
        ("limit_bps", (2,), b"he"),
        ("corrupt_data", (), b"\0" * 5),
        ("substitute", ("l+", "L"), b"heLo"),
        ("delay", (0.1,), b"hello"),
        ("limit_time", (60, 0), b"hello"),
    ]


@BOTH
@pytest.mark.parametrize(("name", "arguments", "becomes"), _late())
async def test_udp_conditions(
    direction: str, name: str, arguments: tuple[Any, ...], becomes: bytes | None
) -> None:
    async with udp() as world:
        source, sink = along(direction, *await world.connect())
        calls = await on(world.gate, direction, name)(*arguments)
        await send(source, b"hello")
        if becomes is not None:
            assert await datagram(sink) == becomes
        await calls.wait_call()
        ending = name in ("close_on_data", "limit_bytes")
        await on(world.gate, direction, "pass")()
        if ending:
            await _until(lambda: not world.gate.is_connected())
            source, sink = along(direction, *await world.connect())
        await passes(source, sink)


async def _until(is_so: Callable[[], bool]) -> None:
    """Let other tasks run until it is so."""
    while not is_so():  # noqa: ASYNC110 (the gate has no event for it)
        await asyncio.sleep(0)


async def test_udp_stop_accepting_leaves_known_clients_alone() -> None:
    async with udp() as world:
        known = await world.connect()
        await world.gate.stop_accepting()
        stranger = fresh(socket.SOCK_DGRAM)
        await asyncio.get_running_loop().sock_connect(
            stranger, world.gate.get_sockname_for_clients()
        )
        await send(stranger, b"lost")
        await passes(*known, b"known")
        world.gate.start_accepting()
        await passes(*await world.connect(), b"new")


async def test_udp_stop_and_start() -> None:
    async with udp() as world:
        await world.connect()
        address = world.gate.get_sockname_for_clients()
        await world.gate.stop()
        assert not world.gate.is_connected()
        world.gate.start()
        assert world.gate.get_sockname_for_clients() == address
        await passes(*await world.connect())


@pytest.mark.parametrize(("name", "argument"), [("smaller_parts", 1), ("concat_packets", 1)])
@BOTH
async def test_not_for_udp(direction: str, name: str, argument: int) -> None:
    async with udp() as world:
        with pytest.raises(NotImplementedError, match="datagram"):
            on(world.gate, direction, name)(argument)


async def test_a_held_direction_costs_no_cpu() -> None:
    async with tcp() as world:
        client, server = await world.connect()
        world.gate.to_server_noop()
        await send(client, b"held")
        before = time.process_time()
        assert await is_silent(server)
        assert time.process_time() - before < NEVER / 2


def test_every_coroutine_is_run() -> None:
    """A guard: without the hook in conftest.py pytest would skip these tests."""
    kinds = [value for name, value in globals().items() if name.startswith("test_")]
    assert sum(asyncio.iscoroutinefunction(kind) for kind in kinds) > 20
