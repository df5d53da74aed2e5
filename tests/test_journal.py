"""The journal: what it believes after a kill, a torn line, a lost tail, a failed flush."""

import json
import random

import pytest

from convert.journal import Done, Journal
from mlx_dsv3.checkpoint.unfinished import journal_line
from mlx_dsv3.errors import UserError

HEAD = {"recipe": "q4", "plan": "0f", "units": 9, "mlx": "0.32", "device": "cpu"}
ERRORS = [[0.1, 2.5e-7], None]


def done(index: int) -> Done:
    return Done(f"{index:064x}", ERRORS)


def write(path, num_synced: int, num_more: int) -> bytes:
    """Write a journal with some synced and some unsynced units; return its bytes."""
    journal = Journal(path)
    journal.begin(HEAD)
    for index in range(num_synced):
        journal.add(index, done(index))
    journal.mark_synced(list(range(num_synced)))
    for index in range(num_synced, num_synced + num_more):
        journal.add(index, done(index))
    journal.close()
    return path.read_bytes()


def test_units_after_the_last_sync_must_be_confirmed(tmp_path):
    write(tmp_path / "journal", 3, 2)
    journal = Journal(tmp_path / "journal")
    assert journal.head == HEAD and not journal.is_finishing
    assert journal.done == {index: done(index) for index in range(3)}
    assert journal.begin(HEAD) == {3: done(3), 4: done(4)}
    journal.close()


def test_a_confirmed_unit_survives_and_another_is_forgotten(tmp_path):
    """The unsynced tail is cut: a later mark must not cover a unit that was lost."""
    write(tmp_path / "journal", 3, 2)
    journal = Journal(tmp_path / "journal")
    unconfirmed = journal.begin(HEAD)
    journal.add(4, unconfirmed[4])
    journal.mark_synced([4])
    journal.close()
    assert set(Journal(tmp_path / "journal").done) == {0, 1, 2, 4}


def test_units_that_a_mark_leaves_out_stay_unconfirmed(tmp_path):
    """They stand before the mark in the file, survive the cut, and may not be counted as others."""
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.begin(HEAD)
    for index in range(4):
        journal.add(index, done(index))
    journal.mark_synced([0, 1])
    journal.close()
    journal = Journal(path)
    assert set(journal.begin(HEAD)) == {2, 3}
    journal.add(3, done(3))  # 2 was lost
    journal.mark_synced([3])
    journal.close()
    again = Journal(path)
    assert set(again.done) == {0, 1, 3} and set(again.unsynced) == {2}


@pytest.mark.parametrize("damage", ["cut", "zeroed", "flipped"])
def test_every_damaged_tail_is_a_prefix(tmp_path, damage):
    """Whatever happens to the end of the file, what is believed is a prefix of what was said."""
    path = tmp_path / "journal"
    data = write(path, 3, 3)
    for place in range(len(data)):
        if damage == "cut":
            path.write_bytes(data[:place])
        elif damage == "zeroed":
            path.write_bytes(data[:place] + bytes(len(data) - place))
        else:
            path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        journal = Journal(path)
        found = {**journal.done, **journal.unsynced}
        assert list(found) == list(range(len(found)))
        assert all(found[index] == done(index) for index in found)
        assert set(journal.done) in (set(), {0, 1, 2})


def test_a_failed_flush_takes_its_units_back(tmp_path):
    """After EIO or ENOSPC in fsync the page cache still shows what the disk may not have."""
    journal = Journal(tmp_path / "journal")
    journal.begin(HEAD)
    journal.add(0, done(0))
    journal.mark_synced([0])
    journal.add(1, done(1))
    journal.drop_unsynced()
    journal.close()
    again = Journal(tmp_path / "journal")
    assert set(again.done) == {0} and again.begin(HEAD) == {}
    again.close()


def test_finishing_is_remembered(tmp_path):
    write(tmp_path / "journal", 2, 0)
    journal = Journal(tmp_path / "journal")
    journal.begin(HEAD)
    journal.mark_finishing()
    journal.close()
    assert Journal(tmp_path / "journal").is_finishing


def test_units_to_do_again_are_forgotten_with_the_new_head(tmp_path):
    """In one line: after a kill, neither the old head's units nor the new head stand alone."""
    path, head = tmp_path / "journal", HEAD | {"files": {}}
    before = write(path, 4, 2)
    journal = Journal(path)
    assert set(journal.begin(head, [1, 5])) == {4}
    assert set(journal.done) == {0, 2, 3}
    journal.close()
    again = Journal(path)
    assert again.head == head and set(again.done) == {0, 2, 3}
    path.write_bytes(path.read_bytes()[:-1])
    torn = Journal(path)
    assert torn.head == HEAD and set(torn.done) == {0, 1, 2, 3}
    assert path.read_bytes()[:100] == before[:100]


def test_an_unreadable_head_begins_anew(tmp_path):
    path = tmp_path / "journal"
    path.write_bytes(b"\0" * 100)
    journal = Journal(path)
    assert journal.head is None and journal.begin(HEAD) == {}
    journal.close()
    assert Journal(path).head == HEAD


NONSENSE = [None, True, -1, 10**30, 1.5, float("nan"), "", "x", [], [1], [[]], {}, {"unit": 1}]


def spoil(value, draw: random.Random):
    """Return a JSON value of which some part is missing, added or another."""
    if not value or not isinstance(value, dict | list) or draw.random() < 0.2:
        return draw.choice(NONSENSE)
    copy = value.copy()
    place = draw.choice(list(copy)) if isinstance(copy, dict) else draw.randrange(len(copy))
    what = draw.random()
    if what < 0.2:
        del copy[place]
    elif what < 0.4 and isinstance(copy, dict):
        copy[draw.choice(["unit", "synced", "head", "finishing", "again"])] = draw.choice(NONSENSE)
    else:
        copy[place] = spoil(copy[place], draw)
    return copy


def test_whole_lines_that_say_something_else(tmp_path):
    """Every line has its checksum: a journal is read, or refused in a sentence, and goes on."""
    path, draw, refused = tmp_path / "journal", random.Random(0), 0
    lines = write(path, 3, 2).splitlines()
    entries = [json.loads(line.partition(b" ")[2]) for line in lines]
    for _ in range(1000):
        spoilt = [*entries, {"finishing": True}]
        place = draw.randrange(len(spoilt))
        spoilt[place] = spoil(spoilt[place], draw)
        path.write_bytes(b"".join(map(journal_line, spoilt)))
        try:
            journal = Journal(path)
            journal.begin(journal.head)
            journal.close()
        except UserError as error:
            refused += 1
            assert error.message.startswith(f"`{path}` was written by another version")
    assert 500 < refused < 1000


def test_a_unit_is_synced_once(tmp_path):
    """A mark that names a unit twice was a KeyError."""
    path = tmp_path / "journal"
    unit = {"unit": 1, "sha256": "7f", "errors": []}
    path.write_bytes(b"".join(map(journal_line, [{"head": HEAD}, unit, {"synced": [1, 1]}])))
    with pytest.raises(UserError, match="was written by another version"):
        Journal(path)


def test_a_line_without_end(tmp_path):
    """Thirty megabytes of empty lists took minutes and a gigabyte, with a right checksum."""
    path = tmp_path / "journal"
    entry = {"unit": 0, "sha256": "", "errors": [[]] * 1_000_000}
    path.write_bytes(write(path, 1, 1) + journal_line(entry))
    with pytest.raises(UserError, match="has a line of 1,048,576 bytes or more"):
        Journal(path)
