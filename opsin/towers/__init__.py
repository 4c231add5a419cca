"""Encoders of pictures and sound: one file per architecture, shared by the families that have
it.
"""
