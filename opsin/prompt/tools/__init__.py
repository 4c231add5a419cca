"""Tool-call dialects: how the calls in an answer are written, read and held to a grammar."""
