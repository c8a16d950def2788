"""Testcontainers for Python with fault's image in Toxiproxy's place: testcontainers.py IMAGE SERVER-IMAGE PAGE CONFIG"""
import json
import sys
import time
import urllib.request

sys.path.pop(0)  # This file has the package's name.
from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network
from testcontainers.core.wait_strategies import HttpWaitStrategy

image, server_image, page, config = sys.argv[1:]


def call(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as answer:
        return answer.read().decode()


with Network() as network:
    server = (
        DockerContainer(server_image)
        .with_command("httpd -f -p 80 -h /www")
        .with_network(network)
        .with_network_aliases("server")
    )
    toxiproxy = (
        DockerContainer(image)
        .with_command("-host=0.0.0.0 -config=/config.json")
        .with_volume_mapping(config, "/config.json", "ro")
        .with_exposed_ports(8474, 8666)
        .with_network(network)
        .waiting_for(HttpWaitStrategy(8474, "/version").for_status_code(200))
    )
    with server, toxiproxy:
        at = lambda port: f"http://{toxiproxy.get_container_host_ip()}:{toxiproxy.get_exposed_port(port)}"
        assert call(at(8666)) == page
        toxic = {"name": "late", "type": "latency", "attributes": {"latency": 700}}
        call(at(8474) + "/proxies/web/toxics", toxic)
        start = time.monotonic()
        assert call(at(8666)) == page
        assert time.monotonic() - start >= 0.7
print("driven")
