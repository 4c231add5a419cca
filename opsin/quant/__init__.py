"""Quantised formats: which layers get which, and checkpoints that are stored in one."""
