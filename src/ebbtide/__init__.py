"""Ebbtide: one long request on a small machine."""
