"""A router in front of one engine (``python -m kvcached.bench.router_process PORT ENGINE``)."""

from __future__ import annotations

import sys

from kvcached.router.app import Router
from kvcached.router.fixed import FixedUpstream
from kvcached.router.server import make_server
from kvcached.router.settings import ServeSettings

MODEL = "tiny"


def main(port: int, engine: str) -> None:
    """Serves until it is told to end."""
    settings = ServeSettings.model_validate({"models": [{"name": MODEL}]})
    router = Router(settings, [FixedUpstream(MODEL, engine)])
    make_server(router, "127.0.0.1", port, settings.drain_s).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
