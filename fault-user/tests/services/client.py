"""A client that keeps a connection, as ordinary clients do: client.py PROTOCOL PORT

It is told what to do line by line, and answers each with `ok MILLISECONDS` or `error WHAT`:
    new     asks over a connection of its own
    kept    asks over the connection (or the pool) that it has
    again   the same, but reconnects first when that one is gone
"""

import http.client
import os
import socket
import ssl
import sys
import time

import psycopg2
import psycopg2.pool
import pymysql
import redis

PATIENCE = 20
protocol, port = sys.argv[1], int(sys.argv[2])
HOST = os.environ.get("HOST") or {"one-address": "127.0.0.2", "second-address": "10.78.0.2", "mapped": "::ffff:127.0.0.1"}.get(protocol, "127.0.0.1")


def bytes_client(greeting, question, answer, wrap=lambda connection: connection):
    """A connection of bytes, what to do with it, and how it ends."""

    def connect():
        connection = wrap(socket.create_connection((HOST, port), timeout=PATIENCE))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        greeting(connection)
        return connection

    def ask(connection):
        connection.sendall(question)
        received = b""
        while not received.endswith(answer):
            more = connection.recv(4096)
            if not more:
                raise ConnectionError("closed")
            received += more

    return connect, ask, lambda connection: connection.close()


def nats_greeting(connection):
    assert connection.recv(4096).startswith(b"INFO ")
    connection.sendall(b'CONNECT {"verbose":false}\r\n')


def http_ask(connection):
    connection.request("GET", "/")
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (200, b"well")
    # A client that reconnects by itself would hide what happens to the connection.
    connection.auto_open = 0


def sql_ask(connection):
    cursor = connection.cursor()
    cursor.execute("SELECT 6 * 7")
    assert cursor.fetchone()[0] == 42
    connection.rollback()


def tls(connection):
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(connection)


def postgres():
    return psycopg2.connect(host=HOST, port=port, user="postgres", dbname="postgres", connect_timeout=PATIENCE)


class Pool:
    """Three connections, all of which are asked at each turn."""

    def __init__(self):
        arguments = {"host": HOST, "port": port, "user": "postgres", "dbname": "postgres"}
        self.pool = psycopg2.pool.ThreadedConnectionPool(3, 3, **arguments)

    def ask(self):
        taken = [self.pool.getconn() for _ in range(3)]
        failed = None
        for connection in taken:
            try:
                sql_ask(connection)
            except psycopg2.Error as error:
                failed = error
            self.pool.putconn(connection, close=failed is not None)
        if failed:
            raise failed


def nothing(connection):
    pass


ECHO = bytes_client(nothing, b"hello\n", b"hello\n")
connect, ask, close = {
    "echo": ECHO,
    "mapped": ECHO,
    "one-address": ECHO,
    "second-address": ECHO,
    "tls": bytes_client(nothing, b"hello\n", b"hello\n", tls),
    "nats": bytes_client(nats_greeting, b"PING\r\n", b"PONG\r\n"),
    "http": (lambda: http.client.HTTPConnection(HOST, port, timeout=PATIENCE), http_ask, lambda one: one.close()),
    "postgres": (postgres, sql_ask, lambda one: one.close()),
    "pool": (Pool, Pool.ask, lambda one: one.pool.closeall()),
    "mariadb": (lambda: pymysql.connect(host=HOST, port=port, user="root", read_timeout=PATIENCE), sql_ask, lambda one: one.close()),
    "redis": (lambda: redis.Redis(host=HOST, port=port, socket_timeout=PATIENCE).client(), lambda one: one.ping(), lambda one: one.close()),
}[protocol]


def new():
    connection = connect()
    ask(connection)
    close(connection)


def again():
    global kept
    try:
        ask(kept)
    except Exception:
        kept = connect()
        ask(kept)


kept = connect()
ask(kept)
print("ready", flush=True)
for order in sys.stdin:
    start = time.monotonic()
    try:
        {"new": new, "kept": lambda: ask(kept), "again": again}[order.strip()]()
        print("ok", int((time.monotonic() - start) * 1000), flush=True)
    except Exception as error:
        print("error", type(error).__name__, str(error).replace("\n", " "), flush=True)
