"""HTTP reading of a server that may be slow, broken or hostile: every wait and every size is bounded."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from kvplan.errors import InputError, KvplanError, UnreachableError, shorten

CONNECT_S = 5.0
READ_S = 10.0
TOTAL_S = 20.0
MAX_BODY_BYTES = 16 * 2**20
MAX_REDIRECTS = 3
ENCODINGS = ("", "identity", "gzip")
"""Content encodings that are read. One unpacks a piece to a bounded size; several on top of each other do not."""


@dataclass(frozen=True)
class Access:
    """How to reach a server.

    Attributes:
        token: sent as a bearer token; None sends none.
        ca_file: certificates to trust instead of the usual ones.
        total_s: seconds one request may take from start to end, however slowly bytes arrive.

    """

    token: str | None = None
    ca_file: str | None = None
    total_s: float = TOTAL_S


class Server:
    """One server, read path by path; redirects are followed only within its host and port."""

    def __init__(self, url: str, access: Access) -> None:
        base = _base(url)
        self.base = base.copy_with(username=None, password=None)  # shown in results and messages
        self.total_s = access.total_s
        headers = {"User-Agent": "kvplan", "Accept-Encoding": "gzip"} | (
            {"Authorization": f"Bearer {access.token}"} if access.token else {}
        )
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(min(READ_S, access.total_s), connect=CONNECT_S),
            verify=_trust(access),
            headers=headers,
            auth=(base.username, base.password) if base.userinfo else None,
        )

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:  # fmt: skip
        await self.client.aclose()

    async def text(self, path: str) -> str:
        """The body of ``path``.

        Raises:
            UnreachableError: no connection, TLS that fails, or no whole answer in time (exit 4).
            InputError: an answer that is an error, too large, broken, or not text (exit 2).

        """
        url = self.base.copy_with(path=self.base.path.rstrip("/") + path)
        try:
            async with asyncio.timeout(self.total_s):
                return await self._follow(url)
        except TimeoutError as error:
            raise UnreachableError(f"{url}: no whole answer within {self.total_s:g} s") from error
        except httpx.TimeoutException as error:
            raise UnreachableError(f"{url}: no answer in time", hint="is the server still starting?") from error
        except httpx.HTTPError as error:
            raise _plain(url, error) from error
        except UnicodeError as error:  # a host name that is none
            raise InputError(f"{url}: redirects to no address") from error

    async def json_object(self, path: str) -> Mapping[str, Any]:
        """The JSON object at ``path``; empty where the server has none there.

        Raises:
            UnreachableError: as ``text``.

        """
        import json

        try:
            data = json.loads(await self.text(path))
        except (InputError, ValueError, RecursionError):
            return {}
        return data if isinstance(data, dict) else {}

    async def _follow(self, url: httpx.URL) -> str:
        for _ in range(MAX_REDIRECTS + 1):
            found = await self._get(url)
            if isinstance(found, str):
                return found
            if (found.raw_host, found.port, found.scheme) != (url.raw_host, url.port, url.scheme):
                raise InputError(f"{url}: redirects to {shorten(str(found), 80)}",
                                 hint="give that address yourself if you trust it")  # fmt: skip
            url = found
        raise InputError(f"{url}: redirects more than {MAX_REDIRECTS} times")

    async def _get(self, url: httpx.URL) -> str | httpx.URL:
        async with self.client.stream("GET", url) as response:
            if response.next_request is not None:
                return response.next_request.url
            if response.status_code != 200:
                raise InputError(f"{url}: HTTP {response.status_code} {response.reason_phrase}".rstrip(),
                                 hint=_hint(response.status_code))  # fmt: skip
            encoding = response.headers.get("content-encoding", "").strip().lower()
            if encoding not in ENCODINGS:
                raise InputError(f"{url}: broken answer: encoded as {shorten(encoding, 40)}")
            kind = response.headers.get("content-type", "")
            if "html" in kind:
                raise InputError(f"{url}: a web page, not metrics", hint="is this the server's own port?")
            body = bytearray()
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > MAX_BODY_BYTES:
                    raise InputError(f"{url}: more than {MAX_BODY_BYTES >> 20} MiB, not metrics")
        try:
            return body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{url}: the answer is not text") from error


def _base(text: str) -> httpx.URL:
    """The server's address, whichever of its pages was given."""
    try:
        url = httpx.URL(text if "//" in text else f"http://{text}")
        if not 0 < (url.port or 80) <= 65535 or not url.host.isprintable():  # the host is decoded here
            raise ValueError
    except (httpx.InvalidURL, ValueError) as error:
        raise InputError(f"--url {shorten(text)!r} is not an address", hint="write http://host:8000") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(f"--url {shorten(text)!r} is not an http address", hint="write http://host:8000")
    path = url.path.rstrip("/").removesuffix("/metrics").removesuffix("/models").removesuffix("/v1")
    return url.copy_with(path=path or "/", query=None, fragment=None)


def _trust(access: Access) -> ssl.SSLContext | bool:
    if access.ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=access.ca_file)
    except OSError as error:
        raise InputError(f"{access.ca_file}: no certificates can be read from it") from error


def _hint(status: int) -> str | None:
    if status in (401, 403):
        return "the server wants a key: set KVPLAN_API_KEY"
    if status == 404:
        return "is this vLLM or SGLang? SGLang needs --enable-metrics"
    return "the server has a problem of its own: look at its log" if status >= 500 else None


def _plain(url: httpx.URL, error: httpx.HTTPError) -> KvplanError:
    """One line for what went wrong on the way."""
    reason = shorten(str(error) or type(error).__name__, 120)
    if "ssl" in reason.lower() or "certificate" in reason.lower():
        return UnreachableError(f"{url}: TLS failed: {reason}", hint="--ca-file FILE names certificates of your own")
    if isinstance(error, httpx.RemoteProtocolError | httpx.DecodingError):
        return InputError(f"{url}: broken answer: {reason}")
    return UnreachableError(f"{url}: cannot be reached: {reason}", hint="is the server up, and the port right?")
