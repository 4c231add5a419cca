"""The HTTP server: each protocol a parse and a render over one request and one stream."""
