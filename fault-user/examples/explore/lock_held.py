"""The mistake: a lock is held while a service is waited for, so whoever needs the lock waits, too."""

import socket
import threading
import time

from common import LINES, fail, ping

lock = threading.Lock()
state = {"greeted": False}


def refresh():
    with lock:
        try:
            with socket.create_connection(LINES, timeout=2) as connection:
                state["greeted"] = ping(connection)
        except OSError:
            pass


worker = threading.Thread(target=refresh)
worker.start()
time.sleep(0.1)
if not lock.acquire(timeout=0.5):
    fail("the health check waits for somebody who waits for the service")
print("healthy", state)
lock.release()
worker.join()
