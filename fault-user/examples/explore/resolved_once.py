"""The mistake: the name is looked up once, and that address is used for ever."""

import ipaddress
import socket

from common import fail, ping


def resolve():
    """The address, or nothing when nobody tells it."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.settimeout(0.5)
            asking.connect(("127.0.0.1", 7053))
            asking.send(b"service.internal")
            return str(ipaddress.ip_address(asking.recv(100).decode()))
    except (OSError, ValueError):
        return None


def works(address):
    try:
        with socket.create_connection((address, 7002), timeout=0.5) as connection:
            return ping(connection)
    except OSError:
        return False


address = resolve()
if address is None:
    print("nobody tells where the service is")
elif any(works(address) for _ in range(3)):
    print("works")
else:
    fail(f"the service has moved, and {address} is still asked")
