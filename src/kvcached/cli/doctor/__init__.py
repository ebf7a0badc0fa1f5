"""``kvcached doctor``: what is wrong on this machine, and what to do about it.

Each file looks at one part and yields findings. None of them imports an engine or torch, and none
may need the compiled core at import: that it does not load is a finding.
"""
