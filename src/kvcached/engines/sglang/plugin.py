"""The entry point that SGLang calls in each of its processes (group ``sglang.srt.plugins``).

Versions without plugins come here through the start-up file (``finder.py``).
"""

from __future__ import annotations

from collections.abc import Sequence


def register() -> None:
    """Takes hold of SGLang's modules in this process, also of those that are imported later, if
    ``ENABLE_KVCACHED`` says so.
    """
    from kvcached.engines.sglang import finder

    if take_hold(finder.loaded()):
        finder.wait()


def take_hold(modules: Sequence[str]) -> bool:
    """Installs kvcached into these modules of SGLang, if ``ENABLE_KVCACHED`` says so; whether it
    does.

    Ends the process where it cannot: SGLang only logs what a plugin raises, and would start as if
    all were well.
    """
    from kvcached.config import Config
    from kvcached.errors import KvcachedError

    try:
        config = Config.from_env()
        if config.enabled:
            from kvcached.engines.sglang.install import install

            install(config, modules)
    except KvcachedError as error:
        raise SystemExit(f"kvcached: {error}") from error
    return config.enabled
