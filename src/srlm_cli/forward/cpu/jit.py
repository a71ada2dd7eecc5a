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
    """Compiled code in a folder, found by the name of its function and the types it takes.

    numba also asks for what the function takes from around it. That holds objects which have another number in each
    process, so that it would find nothing; here the name says all of it.
    """

    def _index_key(self, sig, codegen):
        return sig, codegen.magic_tuple()


def jit(shape: str = "") -> Callable[[Callable], Callable]:
    """Compile a function that lets other threads go on, and keep it for the next process where that can be.

    `shape` names what is fixed in the code from outside of it, so that what is kept for one shape is not taken, nor
    overwritten, for another. Code is kept as long as the function's own file is the same; what `vectors` and
    `elementwise` write into it is told by `WRITTEN_WITH`.
    """

    def compiler(function: Callable) -> Callable:
        function.__qualname__ += f"{shape}_{WRITTEN_WITH}"
        compiled = numba.njit(fastmath=True, nogil=True, boundscheck=False, error_model="numpy")(function)
        with suppress(RuntimeError):  # there is no folder to keep it in
            compiled._cache = _Kept(function)

        def call(*arguments):
            try:
                compiled(*arguments)
            except OSError:  # the folder is full: what could not be kept is compiled all the same
                compiled(*arguments)

        return call

    return compiler
