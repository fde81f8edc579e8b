"""Go around handlings: one file per middleware, each loaded only when it is imported by name."""

__all__: tuple[str, ...] = ()
