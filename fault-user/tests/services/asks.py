"""Clients that ask a server for names, under a rule for some of them: asks.py CASE PORT"""

import socket
import ssl
import sys
import time

case, port = sys.argv[1], int(sys.argv[2])


def tls(name, protocols=None, pieces=1):
    """A connection that asks for a name; its ClientHello comes in pieces."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if protocols:
        context.set_alpn_protocols(protocols)
    received, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = context.wrap_bio(received, to_send, server_hostname=name)
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def step(action):
        nonlocal pieces
        while True:
            try:
                return action()
            except ssl.SSLWantReadError:
                data = to_send.read()
                size = -(-len(data) // pieces) or 1
                for at in range(0, len(data), size):
                    connection.sendall(data[at : at + size])
                    if pieces > 1:
                        time.sleep(0.02)
                pieces = 1
                more = connection.recv(4096)
                if not more:
                    raise ConnectionError("closed")
                received.write(more)

    step(session.do_handshake)
    session.write(b"hello\n")
    connection.sendall(to_send.read())
    assert step(lambda: session.read(100)) == b"hello\n"


def request(host):
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    received = b""
    while not received.endswith(b"well"):
        more = connection.recv(4096)
        if not more:
            raise ConnectionError("closed")
        received += more


def spoken(text):
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(text)
    assert connection.recv(100) == text


def is_reset(action, *arguments):
    try:
        action(*arguments)
    except ConnectionResetError:
        return True
    return False


# With these a ClientHello has about 4 KB: several segments.
LONG = [f"{number:0>200}" for number in range(20)]


def sni():
    assert is_reset(tls, "a.example.com", LONG)
    assert not is_reset(tls, "example.org", LONG)
    assert is_reset(tls, "a.example.com")
    assert is_reset(tls, "A.B.EXAMPLE.com", None, 3)
    assert not is_reset(tls, "example.com")
    assert not is_reset(tls, None)
    assert not is_reset(tls, "example.org", None, 3)


def alpn():
    assert is_reset(tls, "a.example", ["http/1.1", "h2"])
    assert not is_reset(tls, "a.example", ["http/1.1"])
    assert not is_reset(tls, "a.example")


def host():
    assert is_reset(request, "api.example.com:80")
    assert not is_reset(request, "www.example.com")


def other():
    """A protocol without names passes, byte for byte."""
    assert not is_reset(spoken, b"hello")
    assert not is_reset(spoken, b"\x16\x03 no TLS")


globals()[case]()
print("understood")
