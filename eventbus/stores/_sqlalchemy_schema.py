"""Know the tables of the SQLAlchemy store: what they are in each dialect, which version, and how they are made."""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    String,
    Table,
    Text,
    create_mock_engine,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.types import TypeEngine

from eventbus.errors import StoreError

__all__ = ("ENTRY", "SCHEMA", "SUBSCRIPTION", "VERSION", "ddl", "include_object", "metadata", "prepare")

log = logging.getLogger("eventbus")

VERSION = 1
"""The version of the tables that this code writes."""
OLDEST = 1
"""The oldest version of this code that may use tables of ``VERSION``, so that both work while an upgrade rolls."""
BINARY = "utf8mb4_nopad_bin"
"""The collation of MariaDB in which every character counts, blanks at the end too."""


SERVERS = {
    "postgresql": ("PostgreSQL", (12, 0), "SHOW server_version"),
    "mysql": ("MariaDB", (10, 6), "SELECT VERSION()"),
    "mariadb": ("MariaDB", (10, 6), "SELECT VERSION()"),
    "sqlite": ("SQLite", (3, 35), "SELECT sqlite_version()"),
}
"""The first to know MATERIALIZED, SKIP LOCKED and RETURNING with UPDATE ... FROM, and how to ask which one it is."""


def _text(length: int) -> TypeEngine[str]:
    """Return the type of a text that is compared character by character."""
    return (
        String(length)
        .with_variant(Text(collation="C"), "postgresql")
        .with_variant(mysql.VARCHAR(length, charset="utf8mb4", collation=BINARY), "mysql", "mariadb")
    )


NAME = _text(200)
RECIPIENT = _text(400)
LONG = Text().with_variant(mysql.LONGTEXT(charset="utf8mb4", collation=BINARY), "mysql", "mariadb")
BYTES = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
NUMBER = BigInteger().with_variant(Integer(), "sqlite")
OPTIONS: dict[str, Any] = {
    "mysql_engine": "InnoDB",
    "mariadb_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mariadb_charset": "utf8mb4",
}

metadata = MetaData()
"""The tables of the store, for Alembic: add it to the ``target_metadata`` of your own, with ``include_object``."""

ENTRY = Table(
    "eventbus_entry",
    metadata,
    Column("seq", NUMBER, Identity(always=True), primary_key=True),
    Column("message_id", NAME, nullable=False),
    Column("recipient", RECIPIENT, nullable=False),
    Column("type", NAME, nullable=False),
    Column("lane", NAME),
    Column("state", SmallInteger, nullable=False),
    Column("due_at", BigInteger, nullable=False),
    Column("claims", Integer, nullable=False, server_default=text("0")),
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("heard", Integer, nullable=False, server_default=text("0")),
    Column("owner", NAME),
    Column("error", LONG),
    Column("body", BYTES),
    sqlite_autoincrement=True,
    **OPTIONS,
)
"""States: 0 ready, 1 done, 2 dead, 3 discarded; ``due_at`` is delay, back-off, lease end and time of death in one."""

SUBSCRIPTION = Table(
    "eventbus_subscription",
    metadata,
    Column("name", RECIPIENT, nullable=False),
    Column("type", NAME, nullable=False),
    Column("ordered", SmallInteger, nullable=False),
    Column("last_seen", BigInteger, nullable=False),
    PrimaryKeyConstraint("name", "type"),
    **OPTIONS,
)

SCHEMA = Table(
    "eventbus_schema",
    metadata,
    Column("version", Integer, nullable=False, primary_key=True, autoincrement=False),
    Column("oldest", Integer, nullable=False),
    **OPTIONS,
)


WANTED: dict[str, Sequence[str]] = {}
"""Index of the entries -> the dialects that have it; empty: all."""


def _index(name: str, *columns: str, where: str = "", only: Sequence[str] = (), unique: bool = False) -> None:
    """Declare an index, in ``only`` some dialects; where there are partial ones, of the rows ``where`` says so."""
    condition = text(where) if where else None
    index = Index(
        f"eventbus_entry_{name}",
        *(ENTRY.c[column] for column in columns),
        unique=unique,
        postgresql_where=condition,
        sqlite_where=condition,
    )
    WANTED[f"eventbus_entry_{name}"] = only
    if only:

        def is_for(*_: Any, dialect: Any, **__: Any) -> bool:
            return dialect.name in only

        index.ddl_if(callable_=is_for)


PARTIAL = ("postgresql", "sqlite")
WHOLE = ("mysql", "mariadb")

_index("once", "message_id", "recipient", unique=True)
_index("lane", "recipient", "lane", "seq", "state", "due_at", where="lane IS NOT NULL")
_index("due", "recipient", "due_at", where="state = 0 AND lane IS NULL", only=PARTIAL)
_index("owned", "due_at", where="state = 0 AND owner IS NOT NULL", only=PARTIAL)
_index("dead", "recipient", "due_at", where="state = 2", only=PARTIAL)
_index("over", "due_at", where="state IN (1, 3)", only=PARTIAL)
_index("ready", "state", "recipient", "lane", "due_at", only=WHOLE)


def include_object(dialect: str) -> Callable[..., bool]:
    """Return what keeps Alembic from making, or missing, the indexes that only other databases have.

    Alembic knows no index that is for one dialect (``Index.ddl_if``).

    Args:
        dialect: ``connection.dialect.name`` in ``env.py``.

    >>> included = include_object("postgresql")  # context.configure(..., include_object=included)
    >>> included(None, "eventbus_entry_ready", "index", False, None), included(None, "orders", "table", False, None)
    (False, True)
    """

    def included(_: object, name: str | None, kind: str, *__: object) -> bool:
        return kind != "index" or dialect in (WANTED.get(name or "") or [dialect])

    return included


def ddl(dialect: str) -> str:
    """Return the statements that make the tables in a dialect: ``postgresql``, ``mariadb``, ``mysql`` or ``sqlite``.

    Raises ``ValueError`` for another.

    >>> print(ddl("sqlite").splitlines()[0])
    CREATE TABLE eventbus_entry (
    """
    if dialect not in ("postgresql", "mariadb", "mysql", "sqlite"):
        raise ValueError(f"no tables for {dialect!r}: known are mariadb, mysql, postgresql and sqlite")
    written: list[str] = []
    driver = {"postgresql": "postgresql+psycopg", "mysql": "mysql+asyncmy", "mariadb": "mariadb+asyncmy"}

    def write(statement: Any, *_: Any, **__: Any) -> None:
        compiled = statement.compile(dialect=engine.dialect)
        written.append(str(compiled).strip().replace("\t", "    "))

    engine = create_mock_engine(f"{driver.get(dialect, dialect)}://", write)
    metadata.create_all(engine, checkfirst=False)
    written.append(f"INSERT INTO eventbus_schema (version, oldest) VALUES ({VERSION}, {OLDEST})")
    return ";\n\n".join("\n".join(line.rstrip() for line in one.splitlines()) for one in written) + ";\n"


def prepare(connection: Connection, *, create: bool, where: str) -> None:
    """Check that the database and its tables are such as this code can use; make the tables if asked to."""
    _check_server(connection, where)
    if create:
        metadata.create_all(connection)
    elif not inspect(connection).has_table(SCHEMA.name):
        raise StoreError(
            f"{where} has no eventbus tables: run the statements of "
            f"eventbus.stores.sqlalchemy.ddl({connection.dialect.name!r}), or add eventbus.stores.sqlalchemy.metadata "
            "to your Alembic target_metadata, or let the store make them (create=True, in a URL ?create=true)"
        )
    found = connection.execute(select(SCHEMA.c.version, SCHEMA.c.oldest).order_by(SCHEMA.c.version.desc())).first()
    if found is None:  # made just now, or by a migration, which writes no rows
        for table in (ENTRY, SUBSCRIPTION):
            connection.execute(select(table).where(text("1 = 0")))
        connection.execute(insert(SCHEMA).values(version=VERSION, oldest=OLDEST))
    elif found.oldest > VERSION:
        raise StoreError(
            f"{where} has eventbus tables of version {found.version}, which this eventbus (version {VERSION}) is too "
            "old for: install the eventbus that made them, or a newer one"
        )
    elif found.version < VERSION:
        raise StoreError(f"{where} has eventbus tables of version {found.version}: bring them to version {VERSION}")
    _check_indexes(connection, where)


def _check_indexes(connection: Connection, where: str) -> None:
    """Warn of indexes without which a claim reads the whole table, and of those that every write pays for in vain."""
    there = {index["name"] for index in inspect(connection).get_indexes(ENTRY.name)}
    included = include_object(connection.dialect.name)
    for name in WANTED:
        wanted = included(None, name, "index")
        if wanted != (name in there):
            log.warning(
                "%s: index %s is %s; see eventbus.stores.sqlalchemy.ddl(%r), and for Alembic include_object",
                where, name, "missing" if wanted else "for another kind of database, and only costs",
                connection.dialect.name,
            )  # fmt: skip


def _check_server(connection: Connection, where: str) -> None:
    """Raise ``StoreError`` for a server that cannot do what the statements ask for."""
    name, oldest, version_sql = SERVERS[connection.dialect.name]
    banner = str(connection.scalar(text(version_sql)))
    numbers = tuple(map(int, re.findall(r"\d+", banner)[:2]))
    wrong_kind = name == "MariaDB" and "mariadb" not in banner.lower()
    if wrong_kind or numbers < oldest:
        version = ".".join(map(str, oldest))
        raise StoreError(
            f"{where} is {'MySQL ' if wrong_kind else ''}{banner}: this store needs {name} {version} or newer"
        )
