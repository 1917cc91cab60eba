"""Bookkeeping of KV memory: which blocks are in use (`blocks`) and which hold a prefix worth keeping (`prefix`)."""
