"""Which programs a job asks for."""

from __future__ import annotations

import pytest

from confidantd.models.config import Config
from confidantd.models.families import spec_from_config
from confidantd.models.programs import program_names, request_key, worth_splitting
from confidantd.models.spec import ProgramRequest
from tests.unit.model_files import LLAMA


def request(hidden: int, purpose: str = "generate", **fields: int) -> ProgramRequest:
    """Of a Llama with blocks of about 12 hidden x hidden parameters."""
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden}
    model = spec_from_config(Config({**LLAMA, **sizes}, "config.json"))
    assert purpose in ("generate", "train")
    return ProgramRequest(model, "generate" if purpose == "generate" else "train", **fields)


@pytest.mark.parametrize(("hidden", "worth"), [(8, False), (512, False), (768, True)])
def test_generation_shares_out_blocks_of_five_million_parameters(hidden: int, worth: bool) -> None:
    """A token reads each weight once, whatever the length."""
    assert worth_splitting(request(hidden)) == worth
    assert worth_splitting(request(hidden, sequence_length=4096)) == worth


@pytest.mark.parametrize(("length", "worth"), [(2, False), (64, True)])
def test_training_counts_tokens_too(length: int, worth: bool) -> None:
    """A short sequence is over before another thread is awake."""
    found = request(512, "train", microbatch_size=1, sequence_length=length)
    assert worth_splitting(found) == worth


def test_programs_of_parts_are_a_request_of_their_own() -> None:
    """No name is in both, so that a stage may be given both."""
    whole = request(8)
    parts = ProgramRequest(whole.model, "generate", split=True)
    assert request_key(whole) != request_key(parts)
    assert program_names(parts) == ("attention_decode", "mlp_decode")
    assert not set(program_names(whole)) & set(program_names(parts))
