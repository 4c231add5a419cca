"""From a hub name or folder to configs and weights."""
