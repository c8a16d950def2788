"""The service, fixed: a connection that fails is replaced, and without the other service there is an older answer."""

import http.server
import socket
import threading

from common import LINES, ping

pool = [socket.create_connection(LINES, timeout=0.5)]
lock = threading.Lock()


def works():
    try:
        if not pool:
            pool.append(socket.create_connection(LINES, timeout=0.5))
        return ping(pool[0])
    except OSError:
        while pool:
            pool.pop().close()
        return False


class Front(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        with lock:
            answer = b"fresh\n" if works() else b"of yesterday\n"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *words):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 7100), Front)
print("ready", flush=True)
server.serve_forever()
