"""Learned-Adapter (Zhang et al. 2023c): adapters whose inner structure is searched."""
