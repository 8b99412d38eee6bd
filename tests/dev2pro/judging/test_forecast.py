import time

import pytest

from dev2pro.judging.forecast import Forecast, in_words


def test_what_is_left_takes_as_long_as_what_was_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    forecast = Forecast(pictures=100, done=20, forwards=800, ranks=2)
    assert forecast.seconds == 0
    with forecast.timed(40):
        clock[0] += 10  # a rank takes 0.25 s for a forward pass
    forecast.count(8, 80)  # two ranks have done as much
    assert (forecast.done, forecast.left) == (28, 720)
    assert forecast.seconds == pytest.approx(720 * 0.25 / 2)
    with forecast.timed(40):
        clock[0] += 30
    assert forecast.seconds == pytest.approx(720 * 0.5 / 2)


@pytest.mark.parametrize(("seconds", "words"), [(4, "4 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (24_600, "6 h 50 min")])
def test_durations(seconds, words):
    assert in_words(seconds) == words
