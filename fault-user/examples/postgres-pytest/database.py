"""A small client of PostgreSQL with a deadline for everything: psycopg2 has none for a query."""

import select
import time

import psycopg2
from psycopg2.extensions import POLL_OK, POLL_READ

PATIENCE_S = 10.0
"""How long what must succeed may take."""

HASTE_S = 0.7
"""How long what must hang is watched."""


class Database:
    """Where PostgreSQL is."""

    def __init__(self, host, port):
        self.host, self.port = host, port

    def connect(self, within_s=PATIENCE_S):
        """A new connection."""
        made = psycopg2.connect(
            host=self.host,
            port=self.port,
            user="postgres",
            dbname="postgres",
            sslmode="disable",
            gssencmode="disable",
            async_=True,
        )
        connection = Connection(made)
        try:
            connection.wait(within_s)
        except BaseException:
            made.close()
            raise
        return connection

    def ask(self, query, within_s=PATIENCE_S):
        """The answer to a query on a new connection."""
        connection = self.connect(within_s)
        try:
            return connection.ask(query, within_s)
        finally:
            connection.close()


class Connection:
    """A connection; its queries raise TimeoutError when they hang, psycopg2.Error when it breaks."""

    def __init__(self, made):
        self._made = made
        self._cursor = None

    def close(self):
        """Closes it."""
        self._made.close()

    def ask(self, query, within_s=PATIENCE_S):
        """The first column of the first row, as text."""
        self._cursor = self._made.cursor()
        self._cursor.execute(query)
        return self.answer(within_s)

    def answer(self, within_s=PATIENCE_S):
        """The answer to what has been asked for."""
        self.wait(within_s)
        return str(self._cursor.fetchone()[0])

    def wait(self, within_s):
        """Waits until nothing is under way."""
        end = time.monotonic() + within_s
        while (state := self._made.poll()) != POLL_OK:
            left = max(0.0, end - time.monotonic())
            reads, writes = ([self._made], []) if state == POLL_READ else ([], [self._made])
            if not any(select.select(reads, writes, [], left)):
                raise TimeoutError(f"nothing after {within_s} s")

    def ends(self, within_s=PATIENCE_S):
        """Whether the server's end closes this idle connection."""
        return bool(select.select([self._made], [], [], within_s)[0])
