"""Carry wires: one file per transport, each loaded only when its URL scheme is named."""

__all__: tuple[str, ...] = ()
