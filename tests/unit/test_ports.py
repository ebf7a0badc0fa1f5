from __future__ import annotations

import socket

from kvcached import ports


def test_an_engine_can_listen_on_a_port_and_ten_thousand_above_it() -> None:
    found = [ports.free_port() for _ in range(200)]
    assert max(found) + 10_000 <= 65_535
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", found[-1]))
