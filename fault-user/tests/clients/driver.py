"""Drives a daemon with the published toxiproxy-python: driver.py HOST PORT UPSTREAM"""

import socket
import sys
import time

import toxiproxy
from toxiproxy.exceptions import InvalidToxic, NotFound, ProxyExists

host, port, upstream = sys.argv[1:]
server = toxiproxy.Toxiproxy()
server.update_api_consumer(host, int(port))


def connect(proxy):
    address, number = proxy.listen.rsplit(":", 1)
    connection = socket.create_connection((address, int(number)), timeout=5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def round_trip(connection):
    start = time.monotonic()
    connection.sendall(b"x")
    assert connection.recv(1) == b"x", "closed"
    return time.monotonic() - start


def fails(exception, action):
    try:
        action()
    except exception:
        return
    raise AssertionError(f"no {exception.__name__}")


assert server.running() and b"2." in server.version()
proxy = server.create(upstream=upstream, name="python")
fails(ProxyExists, lambda: server.create(upstream=upstream, name="python"))
connection = connect(proxy)
assert round_trip(connection) < 0.9
proxy.add_toxic(type="latency", attributes={"latency": 1000})
assert proxy.get_toxic("latency_downstream").attributes["latency"] == 1000
assert round_trip(connection) >= 0.999, "the old connection is slow"
proxy.destroy_toxic("latency_downstream")
assert round_trip(connection) < 0.9, "the old connection is well again"
proxy.add_toxic(type="limit_data", stream="upstream", attributes={"bytes": 3})
limited = connect(proxy)
limited.sendall(b"abcdef")
received = b""
while data := limited.recv(10):
    received += data
assert received in (b"", b"abc"), received
fails(InvalidToxic, lambda: proxy.add_toxic(type="no such thing"))
fails(NotFound, lambda: proxy.destroy_toxic("no such thing"))
with proxy.down():
    fails(ConnectionRefusedError, lambda: connect(proxy))
server.reset()
assert proxy.toxics() == {}
assert round_trip(connect(proxy)) < 0.9
server.populate([{"name": "other", "upstream": upstream, "listen": "127.0.0.1:0"}])
assert sorted(server.proxies()) == ["other", "python"]
server.destroy_all()
assert server.proxies() == {}
print("driven")
