"""The endpoints, one file per family; `body` reads what callers send, `service` is what every handler works with."""
