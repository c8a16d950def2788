"""What client libraries make of injected errors: errors.py API-HOST API-PORT"""

import json
import smtplib
import socket
import struct
import sys
import threading
import urllib.error
import urllib.request

import pymemcache
import pymysql
import redis

api = f"http://{sys.argv[1]}:{sys.argv[2]}"


def call(path, body):
    request = urllib.request.Request(api + path, json.dumps(body).encode())
    return json.load(urllib.request.urlopen(request))


def packet(number, payload):
    return struct.pack("<I", len(payload))[:3] + bytes([number]) + payload


def mysql(connection):
    """Just enough of a server to log in to."""
    greeting = b"\x0a8.0.0\0" + struct.pack("<I", 1) + b"a" * 8 + b"\0" + struct.pack("<HBHH", 0xA208, 33, 2, 0x8)
    greeting += bytes([21]) + bytes(10) + b"b" * 12 + b"\0" + b"mysql_native_password\0"
    connection.sendall(packet(0, greeting))
    connection.recv(4096)
    connection.sendall(packet(2, b"\0\0\0\2\0\0\0"))
    while connection.recv(4096):
        connection.sendall(packet(1, b"\0\0\0\2\0\0\0"))


def smtp(connection):
    connection.sendall(b"220 ready\r\n")
    while connection.recv(4096):
        connection.sendall(b"250 fine\r\n")


def silent(connection):
    while connection.recv(4096):
        pass


def proxy(name, serve, count=None):
    listener = socket.create_server(("127.0.0.1", 0))

    def accept():
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    upstream = "127.0.0.1:%d" % listener.getsockname()[1]
    made = call("/proxies", {"name": name, "listen": "127.0.0.1:0", "upstream": upstream})
    toxic = {"type": "error", "attributes": {"protocol": name, "status": [503]}}
    if count is not None:
        toxic = {"type": "transient", "attributes": {"protocol": name, "count": count}}
    call(f"/proxies/{name}/toxics", toxic)
    return "127.0.0.1", int(made["listen"].rsplit(":", 1)[1])


def error_of(exception, action):
    try:
        action()
    except exception as error:
        return error
    raise AssertionError(f"no {exception.__name__}")


host, port = proxy("http", silent)
error = error_of(urllib.error.HTTPError, lambda: urllib.request.urlopen(f"http://{host}:{port}/", timeout=5))
assert error.code == 503, error

host, port = proxy("redis", silent)
error = error_of(redis.ResponseError, lambda: redis.Redis(host=host, port=port, socket_timeout=5).get("key"))
assert "injected" in str(error), error

host, port = proxy("memcache", silent)
client = pymemcache.Client((host, port), timeout=5)
error = error_of(pymemcache.MemcacheServerError, lambda: client.get("key"))
error_of(pymemcache.MemcacheServerError, lambda: client.set("key", "value", noreply=False))

host, port = proxy("smtp", smtp)
client = smtplib.SMTP(host, port, timeout=5)
error = error_of(smtplib.SMTPHeloError, client.ehlo_or_helo_if_needed)
assert error.smtp_code == 451, error

host, port = proxy("mysql", mysql, count=2)
error = error_of(pymysql.MySQLError, lambda: pymysql.connect(host=host, port=port, user="u", connect_timeout=5, read_timeout=5))
assert error.args[0] == 1105, error
connection = None
for attempt in range(3):
    try:
        connection = pymysql.connect(host=host, port=port, user="u", connect_timeout=5, read_timeout=5)
        break
    except pymysql.MySQLError as error:
        assert error.args[0] == 1105, error
assert connection is not None, "the transient error is over"
connection.cursor().execute("SELECT 1")
print("understood")
