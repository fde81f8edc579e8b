"""The table of mutants fits the code as it is."""

from pathlib import Path

import pytest

from tests.mutants import table
from tests.mutants.table import Mutant

ROOT = Path(__file__).parents[2]
GROUPS = [group for group in vars(table).values() if isinstance(group, tuple)]
MUTANTS = {one.breaks: one for group in GROUPS for one in group if isinstance(one, Mutant)}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_line_is_there_once(mutant: Mutant) -> None:
    """What a mutant breaks stands in its file exactly once, and the tests that should notice exist."""
    assert (ROOT / mutant.file).read_text().count(mutant.line) == 1
    for name in mutant.tests:
        file, _, test = name.partition("::")
        assert test.partition("[")[0] in (ROOT / file).read_text()
