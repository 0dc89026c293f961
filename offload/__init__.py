"""Ebbtide's offload."""
