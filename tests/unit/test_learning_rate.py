"""Learning rates are those of `transformers.get_scheduler`, step by step."""

from __future__ import annotations

import pytest

from confidantd.jobs.learning_rate import default_warmup_steps, learning_rate

PEAK = 3e-4


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(
    ("steps", "warmup_steps"), [(1, 0), (20, 0), (20, 1), (50, 7), (7, 7), (5, 9)]
)
def test_as_transformers(name: str, steps: int, warmup_steps: int) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = "constant_with_warmup" if name == "constant" else name
    scheduler = get_scheduler(theirs, optimizer, warmup_steps, steps)
    for step in range(steps):
        found = learning_rate(name, step, steps, warmup_steps, PEAK)
        assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-14, abs=0)
        optimizer.step()
        scheduler.step()


def test_three_percent_of_warmup_rounded_up_unless_constant() -> None:
    assert default_warmup_steps("linear", 100) == 3
    assert default_warmup_steps("cosine", 101) == 4
    assert default_warmup_steps("linear", 1) == 1
    assert default_warmup_steps("constant", 100) == 0


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="no schedule"):
        learning_rate("step", 0, 10, 0, PEAK)
