"""The GPU backend: fused regions become readable Triton source, run by Triton's compiler, or by its interpreter on CPU tensors.

A region is emitted as a program over tiles: places in memory as sums (:mod:`index`), values as lines of Triton (:mod:`expr`,
:mod:`pointwise`), by a template a family (:mod:`templates`). :mod:`build` makes a callable of a source, on a GPU or under the
interpreter (:mod:`interpret`), and compiles it offline for a GPU that is not there (:mod:`offline`). Up to :mod:`build`, nothing
imports triton. What a region is, is read by modules of the TVM backend that look at the IR alone (``support``, ``shapes``, ``prepare``,
``convform``, ``flashform``); they import no tvm.
"""
