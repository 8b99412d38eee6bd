import pytest

from dev2pro import retry
from dev2pro.retry import LONGEST_PAUSE, TransientError, with_retries


class Failing:
    """Fails so often, then returns 7; `paused` are the pauses between."""

    def __init__(self, failures: int, monkeypatch: pytest.MonkeyPatch, pause: float = 0.0) -> None:
        self.failures, self.pause, self.paused = failures, pause, list[float]()
        monkeypatch.setattr(retry.time, "sleep", self.paused.append)

    def __call__(self) -> int:
        if self.failures:
            self.failures -= 1
            raise TransientError(f"{self.failures} to come", self.pause)
        return 7


def test_it_is_tried_until_it_works_with_growing_pauses(monkeypatch):
    once = Failing(10, monkeypatch)
    assert with_retries(once, 10) == 7
    assert len(once.paused) == 10
    assert all(0.05 * 2**n <= pause <= 0.5 * 2**n for n, pause in enumerate(once.paused[:6]))
    assert max(once.paused) <= LONGEST_PAUSE


def test_what_never_works_is_raised_after_the_last_try_and_without_a_pause(monkeypatch):
    once = Failing(99, monkeypatch)
    with pytest.raises(TransientError, match="96 to come"):
        with_retries(once, 2)
    assert len(once.paused) == 2


def test_a_pause_that_the_server_asks_for_is_made(monkeypatch):
    once = Failing(1, monkeypatch, pause=25.0)
    assert with_retries(once, 1) == 7
    assert once.paused == [25.0]


def test_other_errors_are_not_tried_again(monkeypatch):
    once = Failing(0, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        with_retries(lambda: once() / 0, 5)
    assert not once.paused
