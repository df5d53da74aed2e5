"""The turns of `--turn`, which conftest.py adds to pytest."""

from conftest import TURNS, share


def test_turns_leave_nothing_out():
    """A slow test that no day runs, or that always stands behind one that takes all the time."""
    items = list(range(37))
    assert sorted(sum((share(items, day) for day in range(TURNS)), [])) == items
    assert {share(items, day)[0] for day in range(TURNS * len(items))} == set(items)
    assert share([], 5) == []
