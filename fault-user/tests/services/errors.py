"""What real clients make of their servers' own errors, under a rule that injects them: errors.py CASE PORT"""

import subprocess
import sys

import psycopg2
import psycopg2.errorcodes
import psycopg2.extensions
import pymysql
import redis

case, port = sys.argv[1], int(sys.argv[2])


def postgres(**more):
    return psycopg2.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres", **more)


def raised(kind, action, *arguments):
    try:
        action(*arguments)
    except kind as error:
        return error
    raise AssertionError(f"no {kind}")


def count(connection):
    cursor = connection.cursor()
    cursor.execute("SELECT n FROM counted")
    return cursor.fetchone()[0]


def retries():
    """The usual loop around a transaction."""
    connection = postgres()
    before = count(connection)
    connection.rollback()
    for attempt in range(1, 10):
        cursor = connection.cursor()
        try:
            cursor.execute("SELECT 1")
            cursor.execute("UPDATE counted SET n = n + 1")
            connection.commit()
            break
        except psycopg2.errors.SerializationFailure as error:
            assert error.diag.severity == "ERROR", error
            status = connection.get_transaction_status()
            assert status == psycopg2.extensions.TRANSACTION_STATUS_INERROR, status
            raised(psycopg2.errors.InFailedSqlTransaction, cursor.execute, "SELECT 1")
            connection.rollback()
    assert attempt == 3, attempt
    assert count(connection) == before + 1


def commit():
    connection = postgres()
    before = count(connection)
    connection.cursor().execute("UPDATE counted SET n = n + 1")
    error = raised(psycopg2.errors.SerializationFailure, connection.commit)
    assert "try again" in str(error), error
    assert connection.get_transaction_status() == psycopg2.extensions.TRANSACTION_STATUS_IDLE
    assert count(connection) == before


def login():
    error = raised(psycopg2.OperationalError, postgres)
    assert "FATAL:  sorry, too many clients already" in str(error), error


def insists_on_tls():
    error = raised(psycopg2.OperationalError, lambda: postgres(sslmode="require"))
    assert "does not support SSL" in str(error), error


def farewell():
    psql = ["psql", "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", "-c", "SELECT 1"]
    told = subprocess.run(psql, capture_output=True, text=True).stderr
    assert told.startswith("FATAL:  terminating connection due to administrator command"), told


def prepared():
    """Statements that are prepared once and executed by name; pgbench tries again by itself."""
    script = "BEGIN; UPDATE counted SET n = n + 1; COMMIT;"
    pgbench = ["pgbench", "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", "-n", "-M", "prepared"]
    pgbench += ["-t", "4", "--max-tries=9", "-f", "/dev/stdin", "postgres"]
    told = subprocess.run(pgbench, input=script, capture_output=True, text=True).stdout
    assert "actually processed: 4/4" in told and "total number of retries: 3" in told, told


def mysql():
    connection = pymysql.connect(host="127.0.0.1", port=port, user="root", read_timeout=20)
    cursor = connection.cursor()
    error = raised(pymysql.err.OperationalError, cursor.execute, "update mysql.nothing set a = 1")
    assert error.args == (1213, "Deadlock found when trying to get lock; try restarting transaction"), error
    connection.rollback()
    cursor.execute("SELECT 6 * 7")
    assert cursor.fetchone() == (42,)


def redis_prefixes():
    client = redis.Redis(host="127.0.0.1", port=port, socket_timeout=20, retry_on_error=[])
    assert client.get("key") is None
    raised(redis.exceptions.ReadOnlyError, client.set, "key", 1)
    raised(redis.exceptions.BusyLoadingError, client.lpush, "list", 1)
    moved = raised(redis.exceptions.ResponseError, client.incr, "key")
    moved = redis.exceptions.MovedError(str(moved).removeprefix("MOVED "))
    assert (moved.slot_id, moved.host, moved.port) == (12, "10.0.0.2", 6380), moved


globals()[case]()
print("understood")
