"""Gates with the interface of userver's `pytest_userver.chaos`.

A gate is a proxy between a client and a server, in the test's own process and event loop:

    from pytest_fault import chaos

    async with chaos.TcpGate(chaos.GateRoute("db", "127.0.0.1", 5432)) as gate:
        host, port = gate.get_sockname_for_clients()
        await gate.to_client_delay(0.2)
"""

from pytest_fault.calls import Calls
from pytest_fault.connection import GateException
from pytest_fault.gate import BaseGate, GateRoute, TcpGate, UdpGate
from pytest_fault.interceptors import EvLoop, GateInterceptException, Interceptor

__all__ = [
    "BaseGate",
    "Calls",
    "EvLoop",
    "GateException",
    "GateInterceptException",
    "GateRoute",
    "Interceptor",
    "TcpGate",
    "UdpGate",
]
