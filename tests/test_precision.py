"""Every rung of precision trains as float32 does where updates are far below a bfloat16's last bit; rounding to nearest does not."""

import pytest

from bench import precision

STEPS = 150


@pytest.mark.slow
def test_every_rung_keeps_the_training_but_the_one_that_is_refused():
    found = precision.compare("data/miniature/pipeline", STEPS)
    refused = found.pop("bfloat16, AdamW rounding to nearest (refused)")
    assert len(found) == 4
    for name, kept in found.items():
        assert kept.loss == pytest.approx(1, abs=0.02), name
        assert kept.average_loss == pytest.approx(1, abs=0.02), name
        assert kept.way == pytest.approx(1, abs=0.05), name
        assert kept.average_way == pytest.approx(1, abs=0.05), name
    assert refused.way < 0.3
    assert refused.loss < 0.5
