"""The CPU backend: fused regions become TVM TensorIR, LLVM machine code, and a shared object on disk.

A region is emitted as explicit loops (:mod:`code`), its values as expressions (:mod:`expr`, :mod:`scalar`), by a template
a family (:mod:`templates`). Kernels are compiled in worker processes (:mod:`build`, :mod:`worker`), kept on disk
(:mod:`cache`) and run through tvm-ffi alone (:mod:`launch`): a process that finds its kernels on disk never imports tvm.
"""
