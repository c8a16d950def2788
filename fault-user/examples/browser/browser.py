"""Opens a page in headless Chromium and prints what it measures of its network: browser.py [PORT]"""

import asyncio
import sys
import tempfile
from pathlib import Path

from aiohttp import web

PATIENCE_S = 120
DATA = bytes(200_000)
CHROMIUM = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]


def site(result):
    """The page and what it asks for."""

    async def page(request):
        return web.FileResponse(Path(__file__).with_name("page.html"))

    async def ping(request):
        return web.Response(text="pong")

    async def data(request):
        return web.Response(body=DATA)

    async def echo(request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            await socket.send_str(message.data)
        return socket

    async def measured(request):
        result.set_result(await request.text())
        return web.Response()

    application = web.Application()
    application.add_routes(
        [
            web.get("/", page),
            web.get("/ping", ping),
            web.get("/data", data),
            web.get("/echo", echo),
            web.post("/result", measured),
        ]
    )
    return web.AppRunner(application)


async def main(port):
    result = asyncio.get_running_loop().create_future()
    runner = site(result)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, shutdown_timeout=1).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = await asyncio.create_subprocess_exec(
            *CHROMIUM,
            f"--user-data-dir={profile}",
            f"http://127.0.0.1:{port}/",
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            print(await asyncio.wait_for(result, PATIENCE_S))
        finally:
            browser.terminate()
            await browser.wait()
    await runner.cleanup()


asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 8080))
