"""The chat page: a client of the public API, in this process or over HTTP."""
