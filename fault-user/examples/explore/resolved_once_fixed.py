"""A name that is looked up once, fixed: it is looked up again when its address does not answer."""

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


for _ in range(3):
    address = resolve()
    if address is None:
        print("nobody tells where the service is")
        break
    if works(address):
        print("works")
        break
else:
    fail("the service has moved, and is not found")
