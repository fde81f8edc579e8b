"""Stores, one file each: ``memory`` for tests and first steps, ``sqlite`` (standard library), ``sqlalchemy``."""

__all__: tuple[str, ...] = ()
