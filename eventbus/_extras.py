"""Import an optional library, or say which extra installs it."""

from importlib import import_module
from typing import Any

from eventbus.errors import MissingExtraError

__all__ = ("load", "require")


def require(library: str, *, extra: str, what: str) -> Any:
    """Return the imported module ``library``.

    Raises ``MissingExtraError`` with the install line if that very library is missing; an import error from
    inside it is not hidden.
    """
    try:
        return import_module(library)
    except ModuleNotFoundError as error:
        if error.name is None or (library != error.name and not library.startswith(f"{error.name}.")):
            raise
        raise MissingExtraError(what, extra) from error


def load(path: str) -> Any:
    """Return the object that the import string ``"module:name"`` names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
