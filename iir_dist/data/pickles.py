"""Pickles of strangers. A pickle is code: this reads lists, dicts, strings, numbers and NumPy arrays, and nothing else."""

from __future__ import annotations

import io
import pickle
from typing import Any, Literal

import numpy as np

from iir_dist.errors import InputError


class _PlainUnpickler(pickle.Unpickler):
    """Admits containers, strings, numbers and NumPy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "numpy" and name in ("ndarray", "dtype"):
            return np.ndarray if name == "ndarray" else np.dtype
        if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            if name == "_reconstruct":
                return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
            if name == "scalar":
                return _plain_scalar
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return _plain_array  # how protocol 5 spells an array
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 spells bytes
            return _latin1
        if module in ("builtins", "__builtin__") and name == "bytes":  # and no bytes at all
            return _no_bytes
        raise InputError(f"it holds {module}.{name}, and only lists, dicts, strings, numbers and arrays are admitted")


def _plain_scalar(dtype: np.dtype[Any], data: bytes) -> Any:
    if dtype.hasobject:
        raise InputError("it holds a Python object inside a NumPy scalar")
    return np.frombuffer(data, dtype)[0]


def _plain_array(data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], order: Literal["C", "F"]) -> Any:
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _no_bytes() -> bytes:
    return b""


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise InputError(f"it encodes bytes as {encoding!r}; only latin1 is admitted")
    return text.encode("latin1")


def loads(data: bytes, where: str) -> Any:
    """The value in a pickle. Raises `InputError`, naming `where`, if it holds anything else or is damaged."""
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except InputError as error:
        raise InputError(f"{where} is refused: {error}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise InputError(f"{where} is not a readable pickle: {type(error).__name__}: {error}") from error
