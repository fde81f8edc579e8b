"""The transport of the guide is small, and keeps what it declares."""

import re
from pathlib import Path
from typing import Any

import pytest

from eventbus.testing.conformance import TransportBench, TransportCheck, examine_transport, transport_checks

GUIDE = (Path(__file__).parents[2] / "docs/guides/add-a-transport.md").read_text()
CODE = re.findall(r"(?ms)^```python\n(.*?)^```", GUIDE)[0]
LINES = 60

scope: dict[str, Any] = {}
exec(compile(CODE, "add-a-transport.md", "exec"), scope)
hub_transport = scope["HubTransport"]


@pytest.mark.parametrize("check", transport_checks(hub_transport.capabilities), ids=str)
async def test_exam(check: TransportCheck) -> None:
    """It passes every question that it has to answer."""
    hub: dict[str, Any] = {}
    await examine_transport(TransportBench(make=lambda: hub_transport(hub)), check)


def test_size() -> None:
    """It is as short as the guide for beginners may be, blank lines not counted."""
    assert sum(bool(line.strip()) for line in CODE.splitlines()) <= LINES
