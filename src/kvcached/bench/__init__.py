"""Benchmarks behind ``kvcached bench``: a room of its own that may import everything."""
