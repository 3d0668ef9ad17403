"""The thread that touches the disk: order, wake-ups, and bugs that do not end it."""

from __future__ import annotations

import threading
import time

from edged.events import DevicesChanged, Event, Tick
from edged.helper import Helper, Mailbox

WAIT_S = 10.0


def test_the_mailbox_keeps_the_order_and_wakes_for_each() -> None:
    """First in, first out, and None when it is empty."""
    wakes: list[int] = []
    box = Mailbox(lambda: wakes.append(1))
    events: list[Event] = [Tick(), DevicesChanged(), Tick()]
    for event in events:
        box.put(event)
    assert [box.take() for _ in range(4)] == [*events, None]
    assert len(wakes) == 3


def test_tasks_run_one_after_the_other_and_tell_what_came_of_them() -> None:
    """In the order given, in a thread that is not the caller's."""
    done = threading.Event()
    box = Mailbox(lambda: None)
    seen: list[tuple[int, bool]] = []
    helper = Helper("test", box, lambda text: None)

    def task(number: int) -> list[Event]:
        seen.append((number, threading.current_thread() is threading.main_thread()))
        if number == 9:
            done.set()
        return [Tick()] * (number % 3)

    for number in range(10):
        helper.give(lambda number=number: task(number))
    assert done.wait(WAIT_S)
    helper.close(WAIT_S)
    assert seen == [(n, False) for n in range(10)]
    count = 0
    while box.take() is not None:
        count += 1
    assert count == sum(n % 3 for n in range(10))


def test_a_task_that_raises_is_told_and_the_next_still_runs() -> None:
    """A bug costs one task; the traceback says where."""
    bugs: list[str] = []
    woken = threading.Event()
    box = Mailbox(woken.set)
    helper = Helper("test", box, bugs.append)

    def broken() -> list[Event]:
        raise ValueError("a bug in a task")

    helper.give(broken)
    helper.give(lambda: [Tick()])
    assert woken.wait(WAIT_S)
    helper.close(WAIT_S)
    assert isinstance(box.take(), Tick)
    assert len(bugs) == 1
    assert "a bug in a task" in bugs[0]
    assert "in broken" in bugs[0]


def test_closing_finishes_what_was_given() -> None:
    """The store's last words are written before the daemon ends."""
    seen: list[int] = []
    helper = Helper("test", Mailbox(lambda: None), lambda text: None)
    for number in range(100):
        helper.give(lambda number=number: seen.append(number) or [])
    helper.close(WAIT_S)
    assert seen == list(range(100))


def test_what_can_wait_is_done_once_when_nothing_else_was_given_for_a_moment() -> None:
    """However often it was asked for, after all that was given meanwhile; and at the end in any case."""
    done = threading.Event()
    seen: list[object] = []
    helper = Helper("test", Mailbox(lambda: None), lambda text: None)
    for number in range(10):
        helper.give(lambda number=number: seen.append(number) or [])
        helper.give_later("sum", lambda number=number: seen.append(("sum", number)) or done.set() or [])
    assert done.wait(WAIT_S)
    assert seen == [*range(10), ("sum", 9)]
    helper.give_later("last", lambda: seen.append("last") or [])
    helper.close(WAIT_S)
    assert seen[-1] == "last"


def test_how_long_a_task_has_taken_is_told() -> None:
    """What hangs on a disk shows from outside, and is over when it ends."""
    going, go_on, mailbox = threading.Event(), threading.Event(), Mailbox(lambda: None)
    helper = Helper("test", mailbox, lambda _: None)

    def hang() -> list[Event]:
        going.set()
        assert go_on.wait(30)
        return []

    assert helper.busy_s(time.monotonic()) == 0.0
    helper.give(hang)
    assert going.wait(30)
    assert helper.busy_s(time.monotonic() + 300.0) >= 300.0
    go_on.set()
    helper.close(30)
    assert helper.busy_s(time.monotonic() + 300.0) == 0.0
