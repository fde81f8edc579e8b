"""The sites of the crashes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.family import Family
from tests.crash.site import Site
from tests.servers.databases import database
from tests.servers.server import Server


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Run on asyncio, which all databases have; children may do as they like."""
    return "asyncio"


@pytest.fixture(params=["sqlite", "sqlalchemy", "postgres", "mariadb"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    """Yield every kind of store there is, with the tables of its user; "sqlalchemy": SQLite, by a plain engine."""
    kind: str = request.param
    if kind in {"sqlite", "sqlalchemy"}:
        file = tmp_path / "crash.db"
        scheme = "sqlite" if kind == "sqlite" else "sqlite+pysqlite"
        place = Site(tmp_path, f"{scheme}:///{file}", f"sqlite+aiosqlite:///{file}")
        place.prepare()
        yield place
        return
    server: Server = request.getfixturevalue(kind)
    with database(server) as url:
        place = Site(tmp_path, url, url, server)
        place.prepare()
        yield place


@pytest.fixture
def family(site: Site) -> Iterator[Family]:
    """Return who starts the children of a test, and ends those that a failed test leaves."""
    family = Family(site)
    yield family
    family.end_all()
