"""``kvcached exporter``: the ledgers as Prometheus metrics and as a page; see docs/operating.md."""
