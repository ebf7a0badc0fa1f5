"""The demo: two real engines under one budget, compared with plain ones. Nothing imports this."""
