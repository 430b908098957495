"""Fusion: groups of nodes that become one kernel each."""

from graphopt.passes.fusion.depthwise import FuseDepthwise
from graphopt.passes.fusion.fuse import Fuse
from graphopt.passes.fusion.sibling_matmuls import SiblingMatmuls

__all__ = ["Fuse", "FuseDepthwise", "SiblingMatmuls"]
