"""Errors survive the way from a worker to the driver."""

import inspect
import pickle

from iir_dist import errors


def test_every_error_survives_pickling() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.IirError)]
    assert len(kinds) > 8
    for kind in kinds:
        error = kind("corrupt", "at byte 7") if kind is errors.ImageError else kind("what, expected, remedy")
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
        assert type(again) is kind
        assert str(again) == str(error)
        assert vars(again) == vars(error)


def test_the_tree_in_the_docstring_names_every_class() -> None:
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, errors.IirError):
            assert name in (errors.__doc__ or "")
