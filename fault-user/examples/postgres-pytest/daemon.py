"""`fault daemon` with proxies: a toxic also acts on connections that were open before."""

import contextlib
import json
import subprocess
import urllib.request

from pytest_fault.program import find_command


class Daemon:
    """A daemon on a free port."""

    def __enter__(self):
        self._process = subprocess.Popen(
            [*find_command(), "daemon", "--listen", "127.0.0.1:0"], stderr=subprocess.PIPE, text=True
        )
        line = self._process.stderr.readline()
        if "http://" not in line:
            raise RuntimeError(line + self._process.communicate()[1])
        self.url = "http://" + line.split("http://")[1].split(",")[0].strip()
        return self

    def __exit__(self, *_):
        self._process.terminate()
        self._process.communicate()

    def call(self, method, path, body=None):
        """A request to the API; an answer that is no success is an error."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read() or "null")

    def proxy(self, name, upstream):
        """A proxy to `upstream`, HOST:PORT."""
        body = {"name": name, "listen": "127.0.0.1:0", "upstream": upstream}
        return Proxy(self, self.call("POST", "/proxies", body))

    def reset(self):
        """Enables every proxy and removes every toxic."""
        self.call("POST", "/reset")


class Proxy:
    """A proxy of the daemon; `host` and `port` are where it listens."""

    def __init__(self, daemon, made):
        self._daemon = daemon
        self._path = f"/proxies/{made['name']}"
        self.host, _, port = made["listen"].rpartition(":")
        self.port = int(port)

    def add(self, kind, stream="downstream", **attributes):
        """Adds a toxic, and returns its name."""
        body = {"type": kind, "stream": stream, "attributes": attributes}
        return self._daemon.call("POST", self._path + "/toxics", body)["name"]

    def remove(self, name):
        """Removes a toxic."""
        self._daemon.call("DELETE", f"{self._path}/toxics/{name}")

    @contextlib.contextmanager
    def toxic(self, kind, stream="downstream", **attributes):
        """`with proxy.toxic("latency", latency=1000):`, on old connections and on new ones."""
        name = self.add(kind, stream, **attributes)
        try:
            yield
        finally:
            self.remove(name)
