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
    """The instance id (128 bits in hexadecimal), the name that operators see, the pid of the front
    end, whose end is the instance's, and the number of ranks.
    """

    instance: str
    name: str
    front_pid: int
    ranks: int = 1


def assign(vllm_config: Any, config: Config) -> Identity:
    """Gives the engine of this configuration its identity.

    A plain attribute: it travels to the other processes with the configuration, and stays out of
    what vLLM hashes for its compilation cache (``additional_config`` does not). The scheduler's
    part of the configuration has it too: it is all that old versions give their schedulers.
    """
    served = vllm_config.model_config.served_model_name
    served = served[0] if isinstance(served, list) else served
    name = config.name or re.sub(r"[^\w.-]+", "-", os.path.basename(str(served).rstrip("/")))
    ranks = int(vllm_config.parallel_config.world_size)
    identity = Identity(secrets.token_hex(16), name[:63] or "vllm", os.getpid(), ranks)
    for holder in (vllm_config, vllm_config.scheduler_config):
        setattr(holder, _ATTRIBUTE, identity)
    return identity


def assigned(vllm_config: Any) -> bool:
    """Whether ``assign`` gave this configuration an identity: whether its engine is elastic."""
    return isinstance(getattr(vllm_config, _ATTRIBUTE, None), Identity)


def of(holder: Any) -> Identity:
    """The identity that ``assign`` gave a configuration or its scheduler's part; raises EngineError
    where it did not arrive.
    """
    identity = getattr(holder, _ATTRIBUTE, None)
    if not isinstance(identity, Identity):
        raise EngineError("kvcached: the instance's identity did not travel with vLLM's config")
    return identity
