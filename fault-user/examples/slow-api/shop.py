"""A shop that is paid through a third party on port 9000, and its customers.

    shop.py timeouts|breaker|bulkhead [without]

plays the customers of one scenario and ends with 0 when the shop keeps its promise; `without` takes the pattern of
that name out of the shop.
"""

import http.client
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

WORKERS = 8
"""How many requests the shop serves at once."""


class Breaker:
    """Opens after so many failures in a row; a trial after the pause closes it again."""

    def __init__(self, failures=3, pause_s=0.5):
        self._limit, self._pause_s = failures, pause_s
        self._lock, self._failures, self._until = threading.Lock(), 0, 0.0

    def allows(self):
        """Whether a call may be made now."""
        with self._lock:
            if self._failures < self._limit:
                return True
            if time.monotonic() < self._until:
                return False
            # One trial; the others wait for what it finds.
            self._until = time.monotonic() + self._pause_s
            return True

    def learn(self, succeeded):
        """Learns how a call went."""
        with self._lock:
            self._failures = 0 if succeeded else self._failures + 1
            self._until = time.monotonic() + self._pause_s


class Shop:
    """What customers ask, and the three patterns, each of which can be left out."""

    def __init__(self, timeout_s=None, breaker=None, bulkhead=None):
        self._timeout_s, self._breaker = timeout_s, breaker
        self._bulkhead = threading.Semaphore(bulkhead or WORKERS)
        self.workers = ThreadPoolExecutor(WORKERS)

    def catalog(self):
        """What needs no third party."""
        return 200

    def pay(self):
        """A payment: 200, 503 when it was not even tried, 504 when it failed."""
        if not self._bulkhead.acquire(blocking=False):
            return 503
        try:
            if self._breaker and not self._breaker.allows():
                return 503
            succeeded = self._call()
            if self._breaker:
                self._breaker.learn(succeeded)
            return 200 if succeeded else 504
        finally:
            self._bulkhead.release()

    def _call(self):
        connection = http.client.HTTPConnection("127.0.0.1", 9000, timeout=self._timeout_s)
        try:
            connection.request("POST", "/")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


def seconds(call):
    """The answer, and how long it took."""
    start = time.monotonic()
    return call(), time.monotonic() - start


def timeouts(without):
    """Nobody waits for a slow third party for longer than a second."""
    shop = Shop(timeout_s=None if without else 0.5)
    status, took_s = seconds(shop.pay)
    assert status == 504 and took_s < 1.0, f"{status} after {took_s:.1f} s"


def breaker(without):
    """While the third party hangs, customers are told at once; when it is back, they can pay again."""
    shop = Shop(timeout_s=0.3, breaker=None if without else Breaker())
    for _ in range(3):
        assert shop.pay() == 504
    statuses, took_s = seconds(lambda: [shop.pay() for _ in range(20)])
    assert took_s < 1.0, f"20 customers waited {took_s:.1f} s"
    assert 503 in statuses, f"{statuses}: nobody was told"
    end = time.monotonic() + 10
    while shop.pay() != 200:
        assert time.monotonic() < end, "payments did not come back"
        time.sleep(0.05)


def bulkhead(without):
    """Payments that take long don't keep others from looking at the catalog."""
    shop = Shop(timeout_s=5, bulkhead=None if without else WORKERS // 2)
    with shop.workers as workers:
        payments = [workers.submit(shop.pay) for _ in range(3 * WORKERS)]
        status, took_s = seconds(lambda: workers.submit(shop.catalog).result())
        statuses = sorted(payment.result() for payment in payments)
    assert status == 200 and took_s < 0.5, f"the catalog took {took_s:.1f} s"
    assert statuses[0] == 200 and statuses[-1] == 503, statuses


if __name__ == "__main__":
    scenarios = {"timeouts": timeouts, "breaker": breaker, "bulkhead": bulkhead}
    if len(sys.argv) < 2 or sys.argv[1] not in scenarios or sys.argv[2:] not in ([], ["without"]):
        sys.exit("usage: shop.py timeouts|breaker|bulkhead [without]")
    try:
        scenarios[sys.argv[1]](without=sys.argv[2:] == ["without"])
    except AssertionError as error:
        sys.exit(f"shop: {error}")
