"""Read URLs without ever showing one: it may hold a password, also where it is misspelt."""

from collections.abc import Sequence
from urllib.parse import SplitResult, parse_qsl, urlsplit

__all__ = ("options_of", "split_url")


def split_url(url: str) -> SplitResult:
    """Return the parts of a URL. Raises ``ValueError``, which quotes nothing of it and has no cause that does."""
    try:
        return urlsplit(url)
    except ValueError:  # its text shows the host as it was read, which is the password where that is not encoded
        why = "the URL cannot be read: percent-encode what is no letter or digit in its user and password"
    raise ValueError(why)


def options_of(parts: SplitResult, known: Sequence[str]) -> dict[str, str]:
    """Return the options of a URL. Raises ``ValueError`` that names the known ones, and never those that were given.

    >>> options_of(split_url("amqp://localhost?timeout=5"), ("heartbeat", "timeout"))
    {'timeout': '5'}
    """
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    found = dict(pairs)
    if len(found) < len(pairs) or not found.keys() <= {*known}:
        raise ValueError(f"{parts.scheme}:// takes the options {', '.join(known)}, each once, and nothing else")
    return found
