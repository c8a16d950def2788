"""A user service: names in MySQL (or MariaDB), cached in Redis, which has a primary for writes and a replica for reads.

    service.py PORT        MySQL on 3306, the primary on 6379, the replica on 6380

GET /users/ID, PUT /users/ID with the name as the body, GET /health. Whatever a store does, an answer comes in time:
without MySQL the service is read-only, without Redis it is slower.
"""

import contextlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pymysql
import redis

HOST = "127.0.0.1"
TIMEOUT_S = 0.8
CACHE_S = 3600


class Unavailable(Exception):
    """A store that is needed does not do its part."""


@contextlib.contextmanager
def mysql():
    """A cursor; what goes wrong is `Unavailable`."""
    limits = dict(connect_timeout=TIMEOUT_S, read_timeout=TIMEOUT_S, write_timeout=TIMEOUT_S)
    try:
        connection = pymysql.connect(host=HOST, port=3306, user="root", autocommit=True, **limits)
        with connection, connection.cursor() as cursor:
            cursor.execute("create database if not exists users")
            cursor.execute("create table if not exists users.names (id int primary key, name text)")
            yield cursor
    except (pymysql.Error, OSError) as error:
        raise Unavailable(f"MySQL: {error}") from error


def cache(port):
    """A client of the primary (6379) or of the replica (6380)."""
    return redis.Redis(
        HOST, port, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, decode_responses=True
    )


def cached(user):
    """A name from the replica; without it there is no cache."""
    try:
        return cache(6380).get(f"user:{user}")
    except redis.RedisError:
        return None


def read(user):
    """A name and where it comes from."""
    name = cached(user)
    if name is not None:
        return name, "cache"
    with mysql() as cursor:
        cursor.execute("select name from users.names where id = %s", (user,))
        row = cursor.fetchone()
    if row is None:
        return None, "database"
    with contextlib.suppress(redis.RedisError):
        cache(6379).set(f"user:{user}", row[0], ex=CACHE_S)
    return row[0], "database"


def write(user, name):
    """Writes a name. One that the cache can't follow is refused: its readers would go on with the old name."""
    try:
        primary = cache(6379)
        # To take the old name out here instead would cost readers the cache when MySQL then fails.
        primary.ping()
        with mysql() as cursor:
            cursor.execute("replace into users.names values (%s, %s)", (user, name))
        primary.set(f"user:{user}", name, ex=CACHE_S)
    except redis.RedisError as error:
        raise Unavailable(f"Redis: {error}") from error


def mode():
    """What the service can do now."""
    try:
        with mysql() as cursor:
            cursor.execute("select 1")
        cache(6379).ping()
    except (Unavailable, redis.RedisError):
        return "read-only"
    return "read-write"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    def do_GET(self):
        """A name, or how the service is."""
        if self.path == "/health":
            return self.answer(200, mode=mode())
        try:
            name, source = read(self.user())
        except Unavailable as error:
            return self.answer(503, error=str(error))
        if name is None:
            return self.answer(404, error="there is no such user")
        return self.answer(200, name=name, source=source)

    def do_PUT(self):
        """A new name."""
        name = self.rfile.read(int(self.headers["Content-Length"])).decode()
        try:
            write(self.user(), name)
        except Unavailable as error:
            return self.answer(503, error=str(error))
        return self.answer(200, name=name)

    def user(self):
        """The user that the path names."""
        return int(self.path.removeprefix("/users/"))

    def answer(self, status, **body):
        """Answers with JSON."""
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """The tests look at answers, not at a log."""


if __name__ == "__main__":
    ThreadingHTTPServer((HOST, int(sys.argv[1])), Handler).serve_forever()
