"""Which tokens of which requests the next step computes. Plain Python data: no arrays, no I/O, an injected clock."""
