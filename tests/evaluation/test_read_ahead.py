import itertools
import threading
import time

import pytest

from phreg.evaluation.read_ahead import default_workers, read_ahead


def test_results_come_in_the_order_of_the_items_however_long_each_takes():
    def slow(number):
        time.sleep(0.02 if number % 3 == 0 else 0)
        return number * number

    assert list(read_ahead(slow, range(20), workers=4)) == [number * number for number in range(20)]


def test_several_threads_read_at_once():
    together = threading.Barrier(3, timeout=10)  # which lets nobody pass until three are there
    found = read_ahead(lambda number: (together.wait(), number)[1], range(6), workers=3)
    assert list(found) == list(range(6))


def test_no_more_is_read_ahead_than_asked_for():
    begun = []
    coming = read_ahead(begun.append, itertools.count(), workers=2, ahead=3)
    for taken in range(1, 6):
        next(coming)
        time.sleep(0.01)
        assert len(begun) <= taken + 5
    coming.close()
    assert len(begun) <= 10, "nothing more where nobody wants the rest"


def test_an_error_comes_in_the_place_of_its_result_and_ends_the_reading():
    begun = []

    def read(number):
        begun.append(number)
        return 1 / (number - 3)

    coming = read_ahead(read, range(1000), workers=2)
    assert [next(coming) for _ in range(3)] == [-1 / 3, -1 / 2, -1]
    with pytest.raises(ZeroDivisionError):
        next(coming)
    assert len(begun) < 10


def test_there_is_at_least_one_worker_and_at_most_eight():
    assert 1 <= default_workers() <= 8
