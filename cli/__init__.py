"""Ebbtide's cli."""
