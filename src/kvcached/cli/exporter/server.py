"""The exporter's HTTP server: metrics, the page and what the page asks for.

Everything may be read by whoever reaches the port. A setting is changed only with the token, and
only if one was given.
"""

from __future__ import annotations

import hmac
import json
import logging
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from kvcached.cli.exporter.history import History
from kvcached.cli.exporter.metrics import LedgerCollector
from kvcached.cli.exporter.served import Served
from kvcached.cli.output import document, setting_fields
from kvcached.control import open_pool
from kvcached.errors import ConfigError, InvalidArgumentError, KvcachedError
from kvcached.observe import Observer

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
"""How long a client may take to say what it wants."""
MAX_BODY = 4096
_EFFECT_S = 0.3
"""How long the page waits for a limit's effect; it sees the rest by itself."""

PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
    "/served.js": ("served.js", "text/javascript; charset=utf-8"),
    "/chart.js": ("chart.js", "text/javascript; charset=utf-8"),
    "/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
}
_HEADERS = {
    # Nothing from elsewhere, nothing inline, no frame: a name in a ledger cannot become code.
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Exporter(ThreadingHTTPServer):
    """Serves until it is shut down. ``token`` is what a change needs; None allows none."""

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        looks: Observer,
        history: History,
        token: str | None,
        served: Served | None = None,
    ) -> None:
        super().__init__(address, _Handler)
        self.history, self.token, self.served = history, token, served
        self._registry = CollectorRegistry()
        self._registry.register(LedgerCollector(looks))
        self._one_scrape = threading.Lock()

    def metrics(self, accept: str) -> tuple[bytes, str]:
        """The metrics in a form that the client takes, and that form's name."""
        encode, kind = choose_encoder(accept)
        with self._one_scrape:
            return encode(self._registry), kind

    def may_change(self, authorization: str) -> bool:
        """Whether this is the token. Takes as long for a wrong one as for a nearly right one."""
        if self.token is None:
            return False
        expected = f"Bearer {self.token}".encode()
        return hmac.compare_digest(authorization.encode(errors="replace"), expected)


class _Handler(BaseHTTPRequestHandler):
    server: Exporter
    timeout = TIMEOUT_S
    protocol_version = "HTTP/1.1"
    server_version = "kvcached"
    sys_version = ""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path in PAGES:
            name, kind = PAGES[url.path]
            self._answer(HTTPStatus.OK, _page(name), kind)
        elif url.path == "/metrics":
            body, kind = self.server.metrics(self.headers.get("Accept", ""))
            self._answer(HTTPStatus.OK, body, kind)
        elif url.path == "/api/v1/state":
            self._state(parse_qs(url.query).get("after", ["0"])[0])
        elif url.path == "/healthz":
            self._answer(HTTPStatus.OK, b"ok\n", "text/plain")
        elif url.path == "/favicon.ico":
            self._answer(HTTPStatus.NO_CONTENT, b"", "image/x-icon")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"there is nothing under {url.path}")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY:
            self.close_connection = True  # what follows has not been read
            self._refuse(HTTPStatus.BAD_REQUEST, f"expected a body of at most {MAX_BODY} bytes")
            return
        body = self.rfile.read(int(length))
        if urlsplit(self.path).path != "/api/v1/limit":
            self._refuse(HTTPStatus.NOT_FOUND, f"there is nothing under {self.path}")
        elif self.server.token is None:
            self._refuse(HTTPStatus.FORBIDDEN, "read only: start the exporter with --token-file")
        elif not self.server.may_change(self.headers.get("Authorization", "")):
            logger.warning("kvcached: %s sent a wrong token", self.client_address[0])
            self._refuse(HTTPStatus.UNAUTHORIZED, "this is not the token")
        else:
            self._limit(body)

    def _state(self, after: str) -> None:
        sequence = int(after) if after.isdecimal() and len(after) < 16 else 0
        fields = self.server.history.since(sequence)
        settings = {
            "interval_s": self.server.history.interval_s,
            "can_change": self.server.token is not None,
            "serve": None if self.server.served is None else self.server.served.now(),
        }
        self._json(HTTPStatus.OK, document("state", {**settings, **fields}))

    def _limit(self, body: bytes) -> None:
        try:
            device, instance, limit = _wanted_limit(body)
            with open_pool(device) as pool:
                effect = pool.set_limit(instance, limit, wait_s=_EFFECT_S)
                fields = setting_fields(pool.device, effect.account)
        except (ConfigError, InvalidArgumentError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except KvcachedError as error:
            self._refuse(HTTPStatus.CONFLICT, str(error))
        else:
            logger.info("kvcached: %s: limit of %s is now %s", device, instance, limit)
            self._json(HTTPStatus.OK, document("setting", {**fields, "missing": effect.missing}))

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._json(status, document("error", {"error": why}))

    def _json(self, status: HTTPStatus, text: str) -> None:
        self._answer(status, text.encode(), "application/json")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in (*_HEADERS.items(), ("Content-Type", kind)):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("kvcached: %s %s", self.address_string(), format % args)


def _page(name: str) -> bytes:
    return (files("kvcached.cli.exporter") / "page" / name).read_bytes()


def _wanted_limit(body: bytes) -> tuple[str, str, int | str | None]:
    """Device, instance and limit of a request. Raises ConfigError saying what was expected."""
    expected = 'expected {"device": TEXT, "instance": TEXT, "limit": bytes, "40%", "2GiB" or null}'
    try:
        wanted = json.loads(body)
    except (ValueError, RecursionError):
        raise ConfigError(expected) from None
    if not isinstance(wanted, dict) or set(wanted) != {"device", "instance", "limit"}:
        raise ConfigError(expected)
    device, instance, limit = wanted["device"], wanted["instance"], wanted["limit"]
    texts = isinstance(device, str) and device and isinstance(instance, str)
    if not texts or isinstance(limit, bool) or not isinstance(limit, int | str | None):
        raise ConfigError(expected)
    return device, instance, limit
