"""Fusion: groups of nodes that become one kernel each."""

from graphopt.passes.fusion.fuse import Fuse

__all__ = ["Fuse"]
