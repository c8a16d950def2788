"""Network faults for pytest.

The plugin in `pytest_fault.plugin` adds the marker and the fixture `fault`; pytest loads it once
the package is installed. `pytest_fault.chaos` has `TcpGate` and `UdpGate`.
"""

from pytest_fault.chaos import GateRoute, TcpGate, UdpGate
from pytest_fault.errors import FaultError, UnavailableError, UnfiredError
from pytest_fault.rules import Fault, Faults

__all__ = [
    "Fault",
    "FaultError",
    "Faults",
    "GateRoute",
    "TcpGate",
    "UdpGate",
    "UnavailableError",
    "UnfiredError",
]
