"""Drives a daemon with the published chaostoolkit-toxiproxy: chaostoolkit.py API-URL UPSTREAM-HOST UPSTREAM-PORT"""

import socket
import sys
import time

from chaostoxi.proxy import actions as proxies
from chaostoxi.proxy import probes
from chaostoxi.toxic import actions as toxics

url, host, port = sys.argv[1:]
configuration = {"toxiproxy_url": url}


def connect():
    connection = socket.create_connection(("127.0.0.1", int(configuration["chaos_PORT"])), timeout=5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def round_trip(connection):
    start = time.monotonic()
    connection.sendall(b"x")
    assert connection.recv(1) == b"x", "closed"
    return time.monotonic() - start


assert not probes.proxy_exist("chaos", configuration)
assert proxies.create_proxy("chaos", host, int(port), configuration=configuration)
assert probes.proxy_exist("chaos", configuration)
assert probes.get_proxy_attribute("chaos", "upstream", configuration) == f"{host}:{port}"
connection = connect()
round_trip(connection)
assert toxics.create_latency_toxic("chaos", "slow", 200, configuration=configuration)
assert round_trip(connection) >= 0.199, "the old connection is slow"
assert toxics.delete_toxic("chaos", "slow", configuration)
assert round_trip(connection) < 0.199, "the old connection is well again"
for create, values in [
    (toxics.create_bandwith_degradation_toxic, [1000]),
    (toxics.create_slow_connection_close_toxic, [1]),
    (toxics.create_slicer_toxic, [10, 5, 1]),
    (toxics.create_limiter_toxic, [1000]),
]:
    assert create("chaos", create.__name__, *values, configuration=configuration)
assert round_trip(connect())
assert proxies.disable_proxy("chaos", configuration)
try:
    connect()
    raise AssertionError("a disabled proxy accepts")
except ConnectionRefusedError:
    pass
assert proxies.enable_proxy("chaos", configuration)
assert round_trip(connect())
proxies.reset(configuration)
assert probes.get_proxy_attribute("chaos", "toxics", configuration) == []
proxies.delete_proxy("chaos", configuration)
assert not probes.proxy_exist("chaos", configuration)
print("driven")
