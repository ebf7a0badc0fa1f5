"""Who an instance is: made once in the front end, carried by vLLM's own configuration object."""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from typing import Any

from kvcached.config import Config
from kvcached.errors import EngineError

_ATTRIBUTE = "kvcached"


@dataclass(frozen=True, slots=True)
class Identity:
    """The instance id (128 bits in hexadecimal), the name that operators see, and the pid of the
    front end, whose end is the instance's.
    """

    instance: str
    name: str
    front_pid: int


def assign(vllm_config: Any, config: Config) -> Identity:
    """Gives the engine of this configuration its identity.

    A plain attribute: it travels to the other processes with the configuration, and stays out of
    what vLLM hashes for its compilation cache (``additional_config`` does not).
    """
    served = vllm_config.model_config.served_model_name
    served = served[0] if isinstance(served, list) else served
    name = config.name or re.sub(r"[^\w.-]+", "-", os.path.basename(str(served).rstrip("/")))
    identity = Identity(secrets.token_hex(16), name[:63] or "vllm", os.getpid())
    setattr(vllm_config, _ATTRIBUTE, identity)
    return identity


def of(vllm_config: Any) -> Identity:
    """The identity that ``assign`` gave; raises EngineError where it did not arrive."""
    identity = getattr(vllm_config, _ATTRIBUTE, None)
    if not isinstance(identity, Identity):
        raise EngineError("kvcached: the instance's identity did not travel with vLLM's config")
    return identity
