"""Who may use which model. Keys are compared in constant time and appear nowhere else."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvcached.router.errors import ApiError
from kvcached.router.settings import KeySettings


@dataclass(frozen=True, slots=True)
class Access:
    """What the holder of a key may do."""

    models: frozenset[str] | None
    """Names of models, never aliases; None: all of them, and what concerns all of them."""

    def may_use(self, model: str) -> bool:
        """Whether requests to this model are allowed."""
        return self.models is None or model in self.models


EVERYBODY = Access(None)


class Keys:
    """All keys of the service."""

    def __init__(self, keys: Sequence[KeySettings], owners: Mapping[str, str]) -> None:
        """``owners`` says which model a name or alias means."""
        self._accesses: list[tuple[bytes, Access]] = []
        for each in keys:
            models = each.models
            allowed = None if models is None else frozenset(owners.get(m, m) for m in models)
            self._accesses.append((_digest(each.key.get_secret_value()), Access(allowed)))

    def access(self, authorization: bytes | None) -> Access:
        """What the header ``Authorization`` opens. Raises ApiError 401."""
        if not self._accesses:
            return EVERYBODY
        scheme, _, given = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not given.strip():
            text = "This service needs an API key: Authorization: Bearer KEY"
            raise ApiError(401, text, "invalid_api_key", kind="authentication_error")
        digest = hashlib.sha256(given.strip()).digest()
        found = None
        for known, access in self._accesses:  # all of them: the time says nothing
            if hmac.compare_digest(known, digest):
                found = access
        if found is None:
            text = "The API key is not known here."
            raise ApiError(401, text, "invalid_api_key", kind="authentication_error")
        return found


def _digest(key: str) -> bytes:
    """Of equal length for all keys, so that comparing does not tell how long one is."""
    return hashlib.sha256(key.encode()).digest()
