"""The one text decoder, driven by a config, and its paged key-value cache."""
