"""kvcached: elastic, shared KV-cache memory for several LLM engines on one device."""

__version__ = "0.1.0"

__all__ = ["__version__"]
