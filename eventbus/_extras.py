"""Load what is not there in every process: an optional library, or the adapter that a URL names."""

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from eventbus.errors import MissingExtraError

__all__ = ("build", "load", "require")


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


def build(kind: str, scheme: str, url: str, schemes: Mapping[str, str], group: str, limits: object) -> Any:
    """Return the adapter of a URL's scheme, ours first, then the one of an entry-point group, built by ``from_url``.

    Raises ``ValueError``, which shows nothing of the URL but the scheme, for one that nobody offers.
    """
    if scheme in schemes:
        return load(schemes[scheme]).from_url(url, limits=limits)
    offered = {point.name: point for point in entry_points(group=group)}
    if scheme in offered:
        return offered[scheme].load().from_url(url, limits=limits)
    names = sorted({*schemes, *offered})
    close = get_close_matches(scheme, names, n=1)
    known = [f"{name}://" for name in names]
    hint = f"did you mean {close[0]}://? Known" if close else "known"
    raise ValueError(f"no {kind} for {scheme or 'a text without scheme'}://: {hint} are {', '.join(known)}")
