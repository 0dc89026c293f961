"""Ebbtide's prefetch."""
