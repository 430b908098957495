"""Passes that make a graph smaller or more regular."""

from graphopt.passes.simplify.algebra import Algebra
from graphopt.passes.simplify.canonicalize import Canonicalize
from graphopt.passes.simplify.casts import Casts
from graphopt.passes.simplify.cse import CommonSubexpressions
from graphopt.passes.simplify.dce import DeadCode
from graphopt.passes.simplify.fold_batch_norm import FoldBatchNorm
from graphopt.passes.simplify.fold_constants import FoldConstants
from graphopt.passes.simplify.known_indices import KnownIndices
from graphopt.passes.simplify.split_pools import SplitPools
from graphopt.passes.simplify.views import Views

__all__ = ["Algebra", "Canonicalize", "Casts", "CommonSubexpressions", "DeadCode", "FoldBatchNorm", "FoldConstants", "KnownIndices",
           "SplitPools", "Views"]
