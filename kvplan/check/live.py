"""A running server to facts: ``/metrics`` once or twice, ``/v1/models``, ``/version`` or ``/server_info``."""

from __future__ import annotations

import asyncio

from kvplan.check.fetch import Access, Server
from kvplan.check.metrics import read_scrape, report_of
from kvplan.check.server import ServerReport


def read_server(url: str, access: Access, seconds: float = 0.0) -> ServerReport:
    """What the server at ``url`` reports now.

    Args:
        url: its address, or that of its ``/metrics``.
        access: how to reach it.
        seconds: time between two scrapes, whose difference latency and load are then taken from; 0 scrapes once.

    Raises:
        UnreachableError: no answer (exit 4).
        InputError: an answer that is not a vLLM's or SGLang's metrics (exit 2).

    """
    return asyncio.run(_read(url, access, seconds))


async def _read(url: str, access: Access, seconds: float) -> ServerReport:
    async with Server(url, access) as server:
        source = str(server.base).rstrip("/")
        first = read_scrape(await server.text("/metrics"), f"{source}/metrics")
        last = first
        if seconds > 0:
            await asyncio.sleep(seconds)
            last = read_scrape(await server.text("/metrics"), f"{source}/metrics")
        models = (await server.json_object("/v1/models")).get("data")
        about = await server.json_object("/version" if last.engine == "vllm" else "/server_info")
        if not about and last.engine == "sglang":  # before 0.5.12
            about = await server.json_object("/get_server_info")
    entries = [entry for entry in models if isinstance(entry, dict)] if isinstance(models, list) else []
    return report_of(source, last, first if seconds > 0 else None, entries, about)
