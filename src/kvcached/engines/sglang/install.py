"""Taking hold of the SGLang that is being imported in this process."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence

from kvcached.config import Config
from kvcached.engines import base, registry
from kvcached.engines.base import Seam
from kvcached.engines.sglang import adapter, ending, finder, selftest

logger = logging.getLogger(__name__)

_installations: dict[str, base.Installation] = {}


def install(config: Config, modules: Sequence[str]) -> None:
    """Installs the adapter's seams in these modules of SGLang and what belongs to them; a second
    call changes nothing. SGLang's processes do not all have the same modules, and none is made to
    import more.

    Raises UnsupportedEngineError for a version without an adapter, EngineError for a missing seam
    and for a core that does not load: the engine must not start as if all were well.
    """
    version = adapter.running_version()
    registry.find("sglang", version)  # of no module where the version has no adapter
    logging.getLogger("kvcached").setLevel(config.log_level)
    for module in modules:
        if module not in _installations:
            _installations[module] = base.install(_seams(version, module, config))
            if module == finder.SCHEDULER:
                for notice in config.notices:
                    logger.warning("kvcached: %s", notice)
                logger.info("kvcached: took hold of SGLang %s", version)


def _seams(version: str, module: str, config: Config) -> Sequence[Seam]:
    if module == finder.SCHEDULER:
        module_of_version = registry.load("sglang", version)
        selftest.check(version, module_of_version.EXPECTS)
        seams: Sequence[Seam] = module_of_version.seams(config)
        return seams
    owner = importlib.import_module(module)
    return ending.server_seams(owner) if module == finder.SERVER else ending.child_seams(owner)


def uninstall() -> None:
    """Puts every replaced attribute of SGLang back; engines that exist keep what they have."""
    while _installations:
        _installations.popitem()[1].uninstall()
