"""Tell which event loop runs here, and reach it from other threads."""

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from anyio.lowlevel import EventLoopToken, current_token

from eventbus.errors import TransportError

__all__ = ("check_opening", "here", "poster", "surely_in")


def here() -> EventLoopToken | None:
    """Return the event loop of the caller, or None outside of all."""
    try:
        return current_token()
    except RuntimeError:
        return None


def surely_in(home: EventLoopToken) -> bool:
    """Tell whether the caller runs in this event loop, if asyncio can tell quickly; a forked process is elsewhere."""
    try:
        return sys.modules["asyncio"].get_running_loop() is home.native_token
    except (KeyError, RuntimeError):  # it does not run here
        return False


def check_opening(name: str, *, is_open: bool) -> None:
    """Raise ``TransportError`` where a transport that needs asyncio cannot be opened: elsewhere, or once more."""
    try:
        sys.modules["asyncio"].get_running_loop()  # whoever runs on it has imported it, and it takes its time
    except RuntimeError:
        raise TransportError(f"{name} runs on asyncio only, and this is another event loop") from None
    if is_open:
        raise TransportError(f"{name} is open already")


def poster() -> Callable[[Callable[[], object]], None]:
    """Return how another thread has something called in this event loop, without waiting for it."""
    native: Any = current_token().native_token
    call = native.run_sync_soon if hasattr(native, "run_sync_soon") else native.call_soon_threadsafe

    def post(what: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the loop is over, nobody waits
            call(what)

    return post
