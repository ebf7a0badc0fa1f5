"""The HTTP server under the application, set up for it in one place."""

from __future__ import annotations

import math

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kvcached.router.app import Router

KEEP_ALIVE_S = 75
"""How long an idle client stays connected: longer than clients and proxies keep connections."""
BACKLOG = 2048


def make_server(router: Router, host: str, port: int, drain_s: float) -> uvicorn.Server:
    """A server for ``await server.serve(sockets)``; it leaves logging as it is.

    ``drain_s``: how long requests may go on once it was told to end.
    """
    config = uvicorn.Config(
        router,
        host=host,
        port=port,
        loop="uvloop",
        http=HttpToolsProtocol,  # by its class: where it is missing, that is known at the import
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(drain_s),
    )
    return uvicorn.Server(config)
