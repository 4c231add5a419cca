"""The generic family tests: tiny checkpoints, the reference they are compared with, one runner."""
