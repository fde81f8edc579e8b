"""Test what is built on a bus, and what a bus is built on."""

__all__: tuple[str, ...] = ()
