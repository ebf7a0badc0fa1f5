"""What ``kvcached serve`` says of its models and queues, for the page. A thread asks."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from typing import Any

from kvcached.closing import Closing
from kvcached.errors import ConfigError

TIMEOUT_S = 2.0
_MOST_BYTES = 1 << 20
_FIELDS = ("state", "waiting", "running", "admitted", "short_of_memory", "prefill_1000_tokens_s")


class Served(Closing):
    """The models behind one address. Any thread may ask."""

    def __init__(self, url: str, key: str, interval_s: float) -> None:
        """``key`` is an API key that opens all models; empty where none is needed."""
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--serve {url!r}: expected an address such as http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self._interval_s = interval_s
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._request = urllib.request.Request(self.url + "/status", headers=headers)
        # No proxy and no file: one address, asked directly. It must not lead the key elsewhere.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
        self._now: dict[str, Any] = {"url": self.url, "problem": "not asked yet", "models": []}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvcached-served", daemon=True)
        self._thread.start()

    def now(self) -> dict[str, Any]:
        """The models at the last look, and what was wrong with it if anything."""
        return self._now

    def _run(self) -> None:
        while True:
            self._now = {"url": self.url, **self._look()}
            if self._over.wait(self._interval_s):
                return

    def _look(self) -> dict[str, Any]:
        try:
            with self._opener.open(self._request, timeout=TIMEOUT_S) as answer:
                said = json.loads(answer.read(_MOST_BYTES))
            queues = said["queues"]
            models = [
                {"name": name, **{field: queues[name][field] for field in _FIELDS}}
                for name in queues
            ]
        except (OSError, urllib.error.URLError) as error:
            return {"problem": str(getattr(error, "reason", error)), "models": []}
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            return {"problem": "this is no answer of kvcached serve", "models": []}
        return {"problem": "", "models": models}

    def close(self) -> None:
        """Ends the thread."""
        self._over.set()
        self._thread.join()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follows none: the answer is then an error that says so."""
