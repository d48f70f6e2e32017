import pytest

from phreg.progress import stage, told_of, told_to, track


@pytest.fixture
def told():
    return []


def test_each_part_is_told_once_it_is_done(told):
    with told_to(lambda *what: told.append(what)):
        for part in track("norms", ["a", "b"]):
            told.append(part)
    assert told == [("norms", 0, 2), "a", ("norms", 1, 2), "b", ("norms", 2, 2)]


def test_work_that_is_not_counted_is_told_to_begin_and_to_end(told):
    with told_to(lambda *what: told.append(what)), stage("sinks"):
        told.append("work")
    assert told == [("sinks", 0, 1), "work", ("sinks", 1, 1)]


def test_work_is_told_with_the_name_of_what_it_is_done_to(told):
    with told_to(lambda *what: told.append(what)):
        with told_of("dinov2"):
            list(track("norms", [1]))
        list(track("norms", []))
    assert told == [("dinov2: norms", 0, 1), ("dinov2: norms", 1, 1), ("norms", 0, 0)]


def test_nobody_listens_outside_of_the_context(told):
    with told_to(lambda *what: told.append(what)):
        pass
    assert list(track("norms", [1, 2])) == [1, 2]
    assert told == []


def test_the_listener_of_an_inner_context_counts_there_alone(told):
    with told_to(lambda what, *_: told.append(f"outer {what}")):
        with pytest.raises(ZeroDivisionError), told_to(lambda what, *_: told.append(f"inner {what}")):
            _ = [1 / part for part in track("first", [0])]
        list(track("second", []))
    assert told == ["inner first", "outer second"]
