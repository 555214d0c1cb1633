"""Choosing tokens: the distributions of `transformers`, the same draws for the same seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from confidantd.engine.sampling import Sampler, candidates
from confidantd.errors import UsageError
from confidantd.wire.sampling import Sampling

VOCABULARY = 40


def tokens(sampler: Sampler, logits: Any, count: int) -> list[int]:
    return [sampler.pick(logits).token for _ in range(count)]


def test_greedy_takes_the_first_of_equals() -> None:
    """Temperature 0."""
    assert Sampler(Sampling()).pick(np.array([0, 3, 3, 1], np.float32)).token == 1


def test_sampling_follows_the_probabilities() -> None:
    """Frequencies of many draws, and the same draws for the same seed."""
    wanted = np.array([0.5, 0.3, 0.15, 0.05])
    logits = (2 * np.log(wanted)).astype(np.float32)  # temperature 2 undoes the factor
    one, same, other = (Sampler(Sampling(2.0, seed=seed)) for seed in (1, 1, 2))
    draws = tokens(one, logits, 4000)
    assert draws == tokens(same, logits, 4000)
    assert draws != tokens(other, logits, 4000)
    assert np.abs(np.bincount(draws, minlength=4) / 4000 - wanted).max() < 0.03


def test_a_sampler_goes_on_where_another_one_was() -> None:
    """After a loss the tokens so far are given to a new head."""
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1])).astype(np.float32)
    sampling = Sampling(1.0, 0.9, repetition_penalty=1.3, seed=7)
    draws = tokens(Sampler(sampling, [2]), logits, 60)
    rest = Sampler(sampling, [2, *draws[:25]], chosen=25)
    assert tokens(rest, logits, 35) == draws[25:]


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.79, 2), (0.9, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest(top_p: float, kept: int) -> None:
    """The smallest set of most likely tokens that reaches top-p."""
    logits = np.log(np.array([0.15, 0.5, 0.05, 0.3])).astype(np.float32)
    sampler = Sampler(Sampling(1.0, top_p))
    assert set(tokens(sampler, logits, 500)) == set([1, 3, 0, 2][:kept])


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.2, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 3, 17, VOCABULARY, 100]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
def test_the_distribution_is_that_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Temperature, then top-k, then top-p, then min-p."""
    logits = 3 * np.random.default_rng(seed).standard_normal(VOCABULARY, np.float32)
    steps: list[Any] = [TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps += [MinPLogitsWarper(min_p)] if min_p else []
    scores = LogitsProcessorList(steps)(torch.tensor([[0]]), torch.tensor(logits)[None])
    wanted = torch.softmax(scores[0].double(), -1).numpy()
    ids, probabilities = candidates(logits, Sampling(temperature, top_p, top_k, min_p))
    found = np.zeros(VOCABULARY)
    found[ids] = probabilities / probabilities.sum()
    assert np.abs(found - wanted).max() < 1e-6


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.2, 2.5])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    """Of the prompt and of what was chosen since, each token once however often it came."""
    generator = np.random.default_rng(1)
    seen = [3, 5, 3, 39]
    sampler = Sampler(Sampling(repetition_penalty=penalty), seen)
    process = RepetitionPenaltyLogitsProcessor(penalty)
    for _ in range(30):
        logits = generator.standard_normal(VOCABULARY, np.float32)
        wanted = int(process(torch.tensor([seen]), torch.tensor(logits)[None])[0].argmax())
        assert sampler.pick(logits).token == wanted
        seen.append(wanted)


def test_log_probabilities_are_those_of_the_model() -> None:
    """Whatever temperature and penalty make of them; the likeliest tokens first."""
    logits = np.random.default_rng(2).standard_normal(VOCABULARY, np.float32)
    wanted = torch.log_softmax(torch.tensor(logits).double(), -1)
    sampling = Sampling(1.5, repetition_penalty=2.0, logprobs=4)
    choice = Sampler(sampling, range(20)).pick(logits)
    assert choice.logprob == pytest.approx(float(wanted[choice.token]))
    values, ids = wanted.topk(4)
    assert [token for token, _ in choice.likeliest] == ids.tolist()
    assert [logprob for _, logprob in choice.likeliest] == pytest.approx(values.tolist())
    assert Sampler(Sampling(logprobs=0)).pick(logits).likeliest == ()


@pytest.mark.parametrize(
    "wrong",
    [
        Sampling(-1), Sampling(float("nan")), Sampling(float("inf")), Sampling(top_p=0.0),
        Sampling(top_p=1.1), Sampling(top_k=-1), Sampling(min_p=-0.1), Sampling(min_p=1.1),
        Sampling(repetition_penalty=0.0), Sampling(repetition_penalty=1e9), Sampling(logprobs=21),
        Sampling(logprobs=-1),
    ],
)  # fmt: skip
def test_senseless_sampling_is_refused(wrong: Sampling) -> None:
    """With a message that names the value."""
    with pytest.raises(UsageError, match="must be"):
        Sampler(wrong)
