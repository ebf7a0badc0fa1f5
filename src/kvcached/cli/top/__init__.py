"""``kvtop``: devices and instances, live in a terminal."""
