"""Ranks part together: their groups end while all are there, and nothing waits for an end that does not come."""

from tests.helpers import closing_ranks
from tests.helpers.ranks import run_ranks


def test_groups_end_when_the_last_rank_has_come():
    waited = run_ranks(3, closing_ranks.close_late, 1.5)
    assert [rank["closed"] for rank in waited] == [True] * 3
    assert not any(rank["joined"] for rank in waited)
    assert min(rank["seconds"] for rank in waited) > 1.4


def test_an_end_that_does_not_come_is_left():
    assert run_ranks(2, closing_ranks.close_stuck, 0.5) == [{"closed": False, "again": True}] * 2


def test_a_rank_alone_has_nothing_to_end():
    assert closing_ranks.alone() == {"first": [1], "closed": True}
