"""The entry point that vLLM calls in each of its processes (group ``vllm.general_plugins``).

Nothing but the standard library is imported before kvcached is known to be switched on: vLLM
swallows errors of plugin modules at import, but not those of the function that it calls.
"""


def register() -> None:
    """Installs kvcached into this vLLM process if ``ENABLE_KVCACHED`` says so.

    Raises EngineError where it cannot take hold, so that the server does not start as if it had.
    """
    from kvcached.config import Config

    config = Config.from_env()
    if not config.enabled:
        return
    from kvcached.engines.vllm.install import install

    install(config)
