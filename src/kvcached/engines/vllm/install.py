"""Taking hold of the vLLM that is being imported in this process."""

from __future__ import annotations

import importlib
import logging

import vllm

from kvcached.config import Config
from kvcached.engines import base, registry

logger = logging.getLogger(__name__)

_installation: base.Installation | None = None


def install(config: Config) -> base.Installation:
    """Installs the adapter for the running version; a second call changes nothing.

    Raises UnsupportedEngineError for a version without an adapter, EngineError for a changed seam
    and for a core that does not load: the engine must not start as if all were well.
    """
    global _installation
    if _installation is None:
        module = registry.load("vllm", vllm.__version__)
        importlib.import_module("kvcached.engines.vllm.selftest").check_front(module.expects)
        _log_as_vllm_does(config)
        _installation = base.install(module.seams())
        logger.info("kvcached: took hold of vLLM %s", vllm.__version__)
    return _installation


def _log_as_vllm_does(config: Config) -> None:
    """Our lines go to vLLM's own log: its handlers, its format."""
    ours, theirs = logging.getLogger("kvcached"), logging.getLogger("vllm")
    ours.setLevel(config.log_level)
    if theirs.handlers and not ours.handlers:
        ours.handlers = theirs.handlers
        ours.propagate = False
    for notice in config.notices:
        logger.warning("kvcached: %s", notice)


def uninstall() -> None:
    """Puts every replaced attribute of vLLM back; engines that exist keep what they have."""
    global _installation
    if _installation is not None:
        _installation.uninstall()
        _installation = None
