"""The gates: proxies between clients and a server whose behaviour a test changes at any time."""

import asyncio
import contextlib
import dataclasses
import logging
import socket
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

from pytest_fault import interceptors
from pytest_fault.calls import Calls
from pytest_fault.connection import Connection, Direction, GateException, Tap, pump, readable
from pytest_fault.interceptors import CHUNK, EvLoop, Interceptor

logger = logging.getLogger(__name__)

Address = tuple[str, int]

_Gate = TypeVar("_Gate", bound="BaseGate")

_PORTS_TRIED = 20
"""How often a free port is looked for that all addresses of a host have."""

_QUEUED = 1000
"""How many datagrams of a client wait for an interceptor; more are lost, as in a full buffer."""


@dataclasses.dataclass(frozen=True)
class GateRoute:
    """Where a gate listens and where it connects to.

    With `port_for_client=0` it listens on a free port, which `get_sockname_for_clients` returns.
    """

    name: str
    host_to_server: str
    port_to_server: int
    host_for_client: str = "127.0.0.1"
    port_for_client: int = 0


class BaseGate:
    """What both gates have in common.

    Methods that set a fault act at once, also on open connections. They return the calls of the
    interceptor; they can be awaited, which changes nothing.
    """

    _kind: socket.SocketKind

    def __init__(self, route: GateRoute, loop: EvLoop | None = None) -> None:
        self._route = route
        self._given_loop = loop
        self._to_server = Direction()
        self._to_client = Direction()
        self._listening: list[socket.socket] = []
        self._accepting: set[asyncio.Task[None]] = set()
        self._connections: list[Connection] = []
        self._connected = asyncio.Event()

    async def __aenter__(self: _Gate) -> _Gate:
        self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    def start(self) -> None:
        """Open the sockets and start to accept; nothing where that has happened.

        Raises:
            GateException: The address can't be resolved or is in use.

        """
        if self._listening:
            return
        self._listening = self._listen()
        if self._route.port_for_client == 0:
            # After `stop` and `start` it is the same port.
            host, port = self._listening[0].getsockname()[:2]
            self._route = dataclasses.replace(
                self._route, host_for_client=host, port_for_client=port
            )
        BaseGate.start_accepting(self)

    def start_accepting(self) -> None:
        """Start to accept; nothing where that has happened."""
        if not self._listening:
            raise GateException(f'"{self._route.name}" is not started')
        if not self._accepting:
            self._accepting = {
                asyncio.ensure_future(self._accept(sock)) for sock in self._listening
            }

    async def stop_accepting(self) -> None:
        """Stop to accept; the sockets stay open, so that clients connect and are not served."""
        tasks, self._accepting = self._accepting, set()
        await _cancel(tasks)

    async def stop(self) -> None:
        """Stop to accept, and close all sockets."""
        self.to_server_pass()
        self.to_client_pass()
        await BaseGate.stop_accepting(self)
        for sock in self._listening:
            sock.close()
        self._listening = []
        await self.sockets_close()

    async def sockets_close(self, *, count: int | None = None) -> None:
        """Close connections, the oldest first; all of them without `count`."""
        await _cancel({connection.task for connection in self._connections[:count]})

    def get_sockname_for_clients(self) -> Address:
        """Return the address that clients connect to."""
        if self._route.port_for_client == 0:
            raise GateException(f'"{self._route.name}" is not started, so it has no port yet')
        return self._route.host_for_client, self._route.port_for_client

    def info(self) -> str:
        """Return a text about the open sockets."""
        lines = [connection.info() for connection in self._connections] or ["no active sockets"]
        return f'"{self._route.name}": ' + "\n\t".join(lines)

    def set_to_server_interceptor(self, interceptor: Interceptor) -> Calls:
        """Give data from clients to an interceptor of your own."""
        return self._to_server.set(interceptor)

    def set_to_client_interceptor(self, interceptor: Interceptor) -> Calls:
        """Give data from the server to an interceptor of your own."""
        return self._to_client.set(interceptor)

    def to_server_pass(self) -> Calls:
        """Pass data on as it is."""
        return self.set_to_server_interceptor(interceptors.pass_on)

    def to_client_pass(self) -> Calls:
        """Pass data on as it is."""
        return self.set_to_client_interceptor(interceptors.pass_on)

    def to_server_noop(self) -> Calls:
        """Read nothing; nothing is lost."""
        return self.set_to_server_interceptor(interceptors.hold)

    def to_client_noop(self) -> Calls:
        """Read nothing; nothing is lost."""
        return self.set_to_client_interceptor(interceptors.hold)

    def to_server_drop(self) -> Calls:
        """Read data and throw it away."""
        return self.set_to_server_interceptor(interceptors.drop)

    def to_client_drop(self) -> Calls:
        """Read data and throw it away."""
        return self.set_to_client_interceptor(interceptors.drop)

    def to_server_delay(self, delay: float) -> Calls:
        """Send each chunk `delay` seconds after it was read."""
        return self.set_to_server_interceptor(interceptors.delay(delay))

    def to_client_delay(self, delay: float) -> Calls:
        """Send each chunk `delay` seconds after it was read."""
        return self.set_to_client_interceptor(interceptors.delay(delay))

    def to_server_close_on_data(self) -> Calls:
        """Close a connection at its first byte."""
        return self.set_to_server_interceptor(interceptors.close_on_data)

    def to_client_close_on_data(self) -> Calls:
        """Close a connection at its first byte."""
        return self.set_to_client_interceptor(interceptors.close_on_data)

    def to_server_corrupt_data(self) -> Calls:
        """Change every byte."""
        return self.set_to_server_interceptor(interceptors.corrupt)

    def to_client_corrupt_data(self) -> Calls:
        """Change every byte."""
        return self.set_to_client_interceptor(interceptors.corrupt)

    def to_server_limit_bps(self, bytes_per_second: float) -> Calls:
        """Pass so many bytes a second, of all connections together."""
        return self.set_to_server_interceptor(interceptors.limit_rate(bytes_per_second))

    def to_client_limit_bps(self, bytes_per_second: float) -> Calls:
        """Pass so many bytes a second, of all connections together."""
        return self.set_to_client_interceptor(interceptors.limit_rate(bytes_per_second))

    def to_server_limit_time(self, timeout: float, jitter: float) -> Calls:
        """Close a connection when data comes so many seconds after its first data."""
        return self.set_to_server_interceptor(interceptors.limit_time(timeout, jitter))

    def to_client_limit_time(self, timeout: float, jitter: float) -> Calls:
        """Close a connection when data comes so many seconds after its first data."""
        return self.set_to_client_interceptor(interceptors.limit_time(timeout, jitter))

    def to_server_smaller_parts(self, max_size: int, *, sleep_per_packet: float = 0) -> Calls:
        """Pass data in parts of at most `max_size` bytes, each after a pause in seconds."""
        parts = interceptors.smaller_parts(max_size, sleep_per_packet)
        return self.set_to_server_interceptor(parts)

    def to_client_smaller_parts(self, max_size: int, *, sleep_per_packet: float = 0) -> Calls:
        """Pass data in parts of at most `max_size` bytes, each after a pause in seconds."""
        parts = interceptors.smaller_parts(max_size, sleep_per_packet)
        return self.set_to_client_interceptor(parts)

    def to_server_concat_packets(self, packet_size: int) -> Calls:
        """Pass data on when there are at least so many bytes of it."""
        return self.set_to_server_interceptor(interceptors.concat(packet_size))

    def to_client_concat_packets(self, packet_size: int) -> Calls:
        """Pass data on when there are at least so many bytes of it."""
        return self.set_to_client_interceptor(interceptors.concat(packet_size))

    def to_server_limit_bytes(self, bytes_limit: int) -> Calls:
        """Close all connections each time that so many bytes of all of them have passed."""
        limit = interceptors.limit_bytes(bytes_limit, self.sockets_close)
        return self.set_to_server_interceptor(limit)

    def to_client_limit_bytes(self, bytes_limit: int) -> Calls:
        """Close all connections each time that so many bytes of all of them have passed."""
        limit = interceptors.limit_bytes(bytes_limit, self.sockets_close)
        return self.set_to_client_interceptor(limit)

    def to_server_substitute(self, pattern: str, repl: str) -> Calls:
        """Replace what matches a regular expression, in each chunk."""
        return self.set_to_server_interceptor(interceptors.substitute(pattern, repl))

    def to_client_substitute(self, pattern: str, repl: str) -> Calls:
        """Replace what matches a regular expression, in each chunk."""
        return self.set_to_client_interceptor(interceptors.substitute(pattern, repl))

    @property
    def _loop(self) -> EvLoop:
        return self._given_loop or asyncio.get_running_loop()

    async def _accept(self, listening: socket.socket) -> None:
        raise NotImplementedError("use TcpGate or UdpGate")

    def _listen(self) -> list[socket.socket]:
        """Open a socket on each address of the host, all with the same port."""
        route = self._route
        try:
            found = socket.getaddrinfo(
                route.host_for_client, route.port_for_client, type=self._kind
            )
        except OSError as error:
            raise GateException(f"can't resolve {route.host_for_client}: {error}") from error
        tries = 1 if route.port_for_client else _PORTS_TRIED
        for attempt in range(1, tries + 1):
            try:
                return self._bind([(family, address) for family, *_, address in found])
            except OSError as error:
                if attempt == tries:
                    where = f"{route.host_for_client}:{route.port_for_client}"
                    raise GateException(f"can't listen on {where}: {error}") from error
        raise AssertionError("the last attempt raises")

    def _bind(self, addresses: list[tuple[int, Any]]) -> list[socket.socket]:
        opened: list[socket.socket] = []
        try:
            for family, address in addresses:
                port = opened[0].getsockname()[1] if opened else address[1]
                opened.append(socket.socket(family, self._kind))
                opened[-1].setblocking(False)
                self._bind_to(opened[-1], (address[0], port, *address[2:]))
        except OSError:
            for sock in opened:
                sock.close()
            raise
        return opened

    def _bind_to(self, sock: socket.socket, address: Any) -> None:  # noqa: ANN401
        sock.bind(address)

    async def _connect_to_server(self) -> Tap | None:
        """Connect to the first address of the server that accepts; `None` where none does."""
        route, loop = self._route, self._loop
        try:
            found = await loop.getaddrinfo(
                route.host_to_server, route.port_to_server, type=self._kind
            )
        except OSError as error:
            logger.warning('"%s" can\'t resolve %s: %s', route.name, route.host_to_server, error)
            return None
        for family, *_, address in found:
            sock = socket.socket(family, self._kind)
            sock.setblocking(False)
            try:
                await loop.sock_connect(sock, address)
            except OSError as error:
                sock.close()
                logger.warning('"%s" can\'t connect to %s: %s', route.name, address, error)
            except BaseException:
                sock.close()
                raise
            else:
                return Tap(sock)
        return None

    def _pumps(self, client: Tap, server: Tap) -> list[Coroutine[Any, Any, None]]:
        return [
            pump(self._loop, self._to_server, client, server),
            pump(self._loop, self._to_client, server, client),
        ]

    def _add(self, connection: Connection) -> None:
        self._connections.append(connection)
        self._connected.set()


class TcpGate(BaseGate):
    """A gate for TCP: each connection of a client is one to the server."""

    _kind = socket.SOCK_STREAM

    def __init__(self, route: GateRoute, loop: EvLoop | None = None) -> None:
        super().__init__(route, loop)
        self._dialling: set[asyncio.Task[None]] = set()

    def connections_count(self) -> int:
        """Return how many connections are open."""
        return len(self._connections)

    async def wait_for_connections(self, *, count: int = 1, timeout: float = 0.0) -> None:
        """Wait for at least `count` open connections, for `timeout` seconds; for ever with 0.

        Raises:
            asyncio.TimeoutError: There were fewer all the time.

        """
        await asyncio.wait_for(self._have_come(count), timeout if timeout > 0 else None)

    async def stop(self) -> None:
        """Stop to accept, and close all sockets."""
        await _cancel(self._dialling)
        await super().stop()

    def _bind_to(self, sock: socket.socket, address: Any) -> None:  # noqa: ANN401
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        super()._bind_to(sock, address)
        sock.listen()

    async def _have_come(self, count: int) -> None:
        while self.connections_count() < count:
            self._connected.clear()
            await self._connected.wait()

    async def _accept(self, listening: socket.socket) -> None:
        while True:
            client, _ = await self._loop.sock_accept(listening)
            task = asyncio.ensure_future(self._open(Tap(client)))
            self._dialling.add(task)
            task.add_done_callback(self._dialling.discard)

    async def _open(self, client: Tap) -> None:
        server = None
        try:
            server = await self._connect_to_server()
        finally:
            if server is None:
                client.close()
        if server is not None:
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tasks, sockets = self._pumps(client, server), (client, server)
            self._add(Connection(self._route.name, tasks, sockets, self._connections.remove))


class UdpGate(BaseGate):
    """A gate for UDP: the datagrams of each client have a socket of their own to the server."""

    _kind = socket.SOCK_DGRAM

    def __init__(self, route: GateRoute, loop: EvLoop | None = None) -> None:
        super().__init__(route, loop)
        self._clients: dict[Any, asyncio.Queue[bytes]] = {}
        self._admits = True

    def is_connected(self) -> bool:
        """Return whether there is a client whose datagrams are passed on."""
        return bool(self._connections)

    def start(self) -> None:
        """Open the sockets and start to accept; nothing where that has happened."""
        self._admits = self._admits or not self._listening
        super().start()

    def start_accepting(self) -> None:
        """Pass on the datagrams of new clients."""
        self._admits = True

    async def stop_accepting(self) -> None:
        """Lose the datagrams of new clients."""
        self._admits = False

    def to_server_smaller_parts(self, max_size: int, *, sleep_per_packet: float = 0) -> Calls:
        """Not for UDP."""
        raise NotImplementedError("a datagram can't be divided")

    def to_client_smaller_parts(self, max_size: int, *, sleep_per_packet: float = 0) -> Calls:
        """Not for UDP."""
        raise NotImplementedError("a datagram can't be divided")

    def to_server_concat_packets(self, packet_size: int) -> Calls:
        """Not for UDP."""
        raise NotImplementedError("datagrams can't be joined")

    def to_client_concat_packets(self, packet_size: int) -> Calls:
        """Not for UDP."""
        raise NotImplementedError("datagrams can't be joined")

    async def _accept(self, listening: socket.socket) -> None:
        while True:
            await readable(self._loop, listening)
            try:
                data, address = listening.recvfrom(CHUNK)
            except OSError as error:
                logger.info('"%s": a client is gone: %s', self._route.name, error)
                continue
            queue = self._clients.get(address) or await self._admit(listening, address)
            if queue is None or queue.full():
                logger.warning('"%s": a datagram of %s is lost', self._route.name, address)
            else:
                queue.put_nowait(data)

    async def _admit(self, listening: socket.socket, address: Any) -> asyncio.Queue[bytes] | None:  # noqa: ANN401
        """Make a client; `None` while no new ones are admitted, or where there is no server."""
        server = await self._connect_to_server() if self._admits else None
        if server is None:
            return None
        # The interceptors read a client's datagrams from a socket of its own.
        near, far = (Tap(sock) for sock in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
        queue: asyncio.Queue[bytes] = asyncio.Queue(_QUEUED)
        self._clients[address] = queue
        tasks = [
            *self._pumps(near, server),
            self._take(queue, far),
            self._answer(far, listening, address),
        ]

        def forget(connection: Connection) -> None:
            del self._clients[address]
            self._connections.remove(connection)

        self._add(Connection(self._route.name, tasks, (near, far, server), forget))
        return queue

    async def _take(self, queue: asyncio.Queue[bytes], far: Tap) -> None:
        while True:
            await interceptors.send(self._loop, far, await queue.get())

    async def _answer(self, far: Tap, listening: socket.socket, address: Any) -> None:  # noqa: ANN401
        try:
            while True:
                await readable(self._loop, far)
                self._answer_at_once(far, listening, address)
        finally:
            # What an interceptor passed on before it closed the connection.
            self._answer_at_once(far, listening, address)

    def _answer_at_once(self, far: Tap, listening: socket.socket, address: Any) -> None:  # noqa: ANN401
        with contextlib.suppress(BlockingIOError):
            while True:
                data = far.recv(CHUNK)
                try:
                    listening.sendto(data, address)
                except OSError as error:
                    logger.warning('"%s": an answer is lost: %s', self._route.name, error)


async def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(set(tasks))
