"""A lock that is held while waiting, fixed: it is taken when the answer is there."""

import socket
import threading
import time

from common import LINES, fail, ping

lock = threading.Lock()
state = {"greeted": False}


def refresh():
    try:
        with socket.create_connection(LINES, timeout=2) as connection:
            greeted = ping(connection)
    except OSError:
        return
    with lock:
        state["greeted"] = greeted


worker = threading.Thread(target=refresh)
worker.start()
time.sleep(0.1)
if not lock.acquire(timeout=0.5):
    fail("the health check waits for somebody who waits for the service")
print("healthy", state)
lock.release()
worker.join()
