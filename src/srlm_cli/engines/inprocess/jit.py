"""Compile functions with numba."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from zlib import crc32

import numba

from srlm_cli.engines.inprocess import elementwise, vectors

WRITTEN_WITH = format(crc32("".join(map(inspect.getsource, (vectors, elementwise))).encode()), "08x")


def jit(shape: str = "") -> Callable[[Callable], Callable]:
    """Compile a function that lets other threads go on, and keep it for the next process where that can be.

    `shape` names what is fixed in the code from outside of it, so that what is kept for one shape is not taken, nor
    overwritten, for another. numba keeps code by the text of the function's own file and what the function names;
    what `vectors` and `elementwise` write into it is told by `WRITTEN_WITH`.
    """

    def compiler(function: Callable) -> Callable:
        function.__qualname__ += f"{shape}_{WRITTEN_WITH}"
        options = {"fastmath": True, "nogil": True, "boundscheck": False, "error_model": "numpy"}
        try:
            compiled = numba.njit(**options, cache=True)(function)
        except RuntimeError:  # there is no folder to keep it in
            return numba.njit(**options)(function)

        def call(*arguments):
            try:
                compiled(*arguments)
            except OSError:  # the folder is full: what could not be kept is compiled all the same
                compiled(*arguments)

        return call

    return compiler
