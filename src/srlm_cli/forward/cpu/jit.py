"""Compile functions with numba."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from zlib import crc32

import numba
from numba.core.caching import FunctionCache

from srlm_cli.forward.cpu import elementwise, llvm

BLAS = "scipy.linalg"
if BLAS not in sys.modules:  # numba would import it for products of matrices, which no compiled function here has
    sys.modules[BLAS] = None
    try:
        with suppress(ImportError):
            import numba.np.arraymath
    finally:
        del sys.modules[BLAS]

WRITTEN_WITH = format(crc32("".join(map(inspect.getsource, (llvm, elementwise))).encode()), "08x")


class _Kept(FunctionCache):
    """A cache on disk for compiled code, with the name of the function and its argument types as the key.

    numba adds the closure of the function to the key. The closure differs in each process, so cached code would never
    be found. Here the name includes everything that the code depends on.
    """

    def _index_key(self, sig, codegen):
        return sig, codegen.magic_tuple()


def jit(shape: str = "") -> Callable[[Callable], Callable]:
    """Compile a function that releases the GIL, and cache it on disk for the next process if possible.

    `shape` names the constants in the code, so that the cached code of one shape is not used, or overwritten, for
    another. Cached code is valid while the file of the function is unchanged; `WRITTEN_WITH` covers `llvm` and
    `elementwise`, whose code is part of it.
    """

    def compiler(function: Callable) -> Callable:
        function.__qualname__ += f"{shape}_{WRITTEN_WITH}"
        compiled = numba.njit(fastmath=True, nogil=True, boundscheck=False, error_model="numpy")(function)
        with suppress(RuntimeError):  # there is no folder for the cache
            compiled._cache = _Kept(function)

        def call(*arguments):
            try:
                compiled(*arguments)
            except OSError:  # the disk is full: the code is compiled, but not cached
                compiled(*arguments)

        return call

    return compiler
