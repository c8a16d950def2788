"""A web server in a container, started by Testcontainers."""

import os
from collections.abc import Iterator
from urllib.request import urlopen

import pytest
from testcontainers.core.container import DockerContainer
from testcontainers.core.wait_strategies import HttpWaitStrategy

PATIENCE = 30.0
"""A request fails when it takes more than so many seconds."""

SERVE = "sh -c 'echo well > /tmp/index.html; exec httpd -f -p 80 -h /tmp'"


class Web:
    """The server, as this host reaches it: by a published port."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port

    def get(self) -> str:
        """Fetch the page on a new connection."""
        with urlopen(f"http://{self.host}:{self.port}/", timeout=PATIENCE) as answer:
            text: str = answer.read().decode()
            return text.strip()


@pytest.fixture(scope="session")
def web() -> Iterator[Web]:
    """Start the container."""
    image = os.environ.get("WEB_IMAGE", "busybox")
    container = DockerContainer(image).with_command(SERVE).with_exposed_ports(80)
    container.waiting_for(HttpWaitStrategy(80).for_status_code(200))
    with container:
        yield Web(container.get_container_host_ip(), int(container.get_exposed_port(80)))
