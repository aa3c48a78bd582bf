"""The programs that train, as in test_golden: a file of its own, for another worker."""

import pytest

from tests.test_golden import (
    check,
    stored,  # noqa: F401 (a fixture)
)


@pytest.mark.parametrize("group", ["densities", "sound"])
def test_outputs_are_as_stored(group, stored):  # noqa: F811
    check(group, stored)


@pytest.mark.slow
@pytest.mark.parametrize("group", ["vectors", "heads"])
def test_outputs_of_long_programs_are_as_stored(group, stored):  # noqa: F811
    check(group, stored)
