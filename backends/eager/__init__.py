"""The library backend: PyTorch's own kernels. Any operator runs, so nothing is ever unsupported."""

from graphopt.backends.eager.library import LibraryCall

__all__ = ["LibraryCall"]
