"""A real pretrained model on real text, over three daemons, against torch on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import reference
from tests.e2e.devices import swarm

STEPS, BATCH, LENGTH = 40, 8, 128
HELD_OUT_CHARACTERS = 20_000
WITHIN = 0.01  # of the reference's held-out loss


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_fine_tuning_a_real_model(tmp_path: Path, method: str) -> None:
    model = reference.MODELS / "stories260K"
    source = reference.MODELS / "data" / "tinyshakespeare.txt"
    if not model.is_dir() or not source.is_file():
        pytest.skip("the real model and text are not on this machine")
    text = source.read_text()
    data, held_out = tmp_path / "data.txt", tmp_path / "held-out.txt"
    data.write_text(text[HELD_OUT_CHARACTERS:])
    held_out.write_text(text[:HELD_OUT_CHARACTERS])
    rate = 1e-3
    options: list[str] = []
    torch_model: Any = reference.load(model)
    if method == "lora":
        adapter = make_adapter(model, tmp_path / "adapter")
        options = ["--method", "lora", "--init-adapter", str(adapter)]
        torch_model = reference.with_adapter(torch_model, adapter)
    with swarm(tmp_path / "swarm", 3) as devices:
        events = devices[0].events(
            "train", str(model), "--data", str(data), "--output", str(tmp_path / "out"),
            "--steps", str(STEPS), "--batch-size", str(BATCH), "--sequence-length", str(LENGTH),
            "--learning-rate", str(rate), "--no-shuffle", "--eval-data", str(held_out),
            "--devices", "anna,ben,cleo", *options,
        )  # fmt: skip
    assert events[-1]["event"] == "done", events[-1]
    assert [stage["name"] for stage in events[-1]["stages"]] != []
    losses = [event["loss"] for event in events if event["event"] == "eval"]
    assert losses[-1] < losses[0] - 0.3

    held_out_blocks = reference.blocks_of(model, [held_out], LENGTH)
    assert losses[0] == pytest.approx(
        reference.held_out_loss(torch_model, held_out_blocks), rel=1e-4
    )
    reference.train(
        torch_model, reference.blocks_of(model, [data], LENGTH), steps=STEPS, batch_size=BATCH,
        learning_rate=rate, warmup_steps=2,
    )  # fmt: skip
    wanted = reference.held_out_loss(torch_model, held_out_blocks)
    assert losses[-1] == pytest.approx(wanted, rel=WITHIN)

    if method == "full":
        saved = reference.load(tmp_path / "out")
    else:
        saved = reference.with_adapter(reference.load(model), tmp_path / "out")
    assert reference.held_out_loss(saved, held_out_blocks) == pytest.approx(losses[-1], rel=1e-4)


def make_adapter(model: Path, folder: Path) -> Path:
    """A fresh `peft` adapter on the attention projections."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )
    get_peft_model(reference.load(model), config).save_pretrained(folder)
    return folder
