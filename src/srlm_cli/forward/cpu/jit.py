"""Compile functions with numba."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from zlib import crc32

import numba
from numba.core.caching import FunctionCache

from srlm_cli.forward.cpu import elementwise, llvm

WRITTEN_WITH = format(crc32("".join(map(inspect.getsource, (llvm, elementwise))).encode()), "08x")


class _Kept(FunctionCache):
    """Compiled code in a folder, found by the name of its function and its argument types.

    numba also uses the closure of the function as a key. It has objects with another id in each process, so nothing
    would be found; here the name includes everything that the code depends on.
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
            except OSError:  # the folder is full: what could not be kept is compiled all the same
                compiled(*arguments)

        return call

    return compiler
