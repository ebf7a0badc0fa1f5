"""Ports of this machine."""

from __future__ import annotations

import contextlib
import socket

HIGHEST = 55535
"""SGLang (0.5.15 for one) also listens 10,000 above the port that it is given."""
_TRIES = 64


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now, at an address of this machine; at most ``HIGHEST``, unless
    this machine is set up to hand out none of those.
    """
    with contextlib.ExitStack() as probes:
        for _ in range(_TRIES):
            probe = probes.enter_context(socket.socket())
            probe.bind((host, 0))
            port: int = probe.getsockname()[1]
            if port <= HIGHEST:
                break
    return port
