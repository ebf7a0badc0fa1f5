"""The command ``kvctl``: who may hold how much, changed while engines run.

No command needs the engines' consent or a server: settings are rows of the ledger, and engines
follow them within a moment. ``list`` answers from here; all that typer parses is in ``kvctl_app``.
"""

from __future__ import annotations

import sys

from kvcached.cli import edge, listing


def main() -> None:
    """The process's edge."""
    edge.run("kvctl", _main)


def _main() -> int:
    asked = listing.parse(sys.argv[1:])
    if asked is not None:
        return listing.show(*asked, "kvctl")
    from kvcached.cli.kvctl_app import app  # importing typer takes longer than a list

    return edge.call(app, "kvctl")


if __name__ == "__main__":
    main()
