"""The single-process reference: torch, transformers and peft doing what the contract says."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, get_scheduler
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()  # its monitor thread would outlive the test
MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"


@dataclass
class Run:
    """What a reference run gave."""

    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def blocks_of(model: Path, files: list[Path], length: int) -> torch.Tensor:
    """Token blocks [n, S] of whole text files, joined by nothing (one file, one document)."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids: list[int] = []
    for file in files:
        ids += tokenizer.encode(file.read_text(), add_special_tokens=False).ids
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).reshape(count, length)


def load(model: Path) -> Any:
    """The model in float32 with dropout off."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def with_adapter(model: Any, adapter: Path) -> Any:
    """The model with a trainable `peft` adapter."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()


def train(
    model: Any,
    blocks: torch.Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    schedule: str = "linear",
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    order: list[list[int]] | None = None,
) -> Run:
    """AdamW over batches in file order (or `order`), as the contract defines training."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
    scheduler = get_scheduler(schedule, optimizer, warmup_steps, steps)
    run = Run()
    per_epoch = len(blocks) // batch_size
    for step in range(steps):
        place = step % per_epoch
        rows = order[step] if order else list(range(place * batch_size, (place + 1) * batch_size))
        run.learning_rates.append(optimizer.param_groups[0]["lr"])
        loss = mean_loss(model, blocks[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        run.losses.append(float(loss.detach()))
    run.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return run


def mean_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy over all predicted positions."""
    logits = model(input_ids=ids).logits[:, :-1]
    targets = ids[:, 1:]
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    )


@torch.no_grad()
def held_out_loss(model: Any, blocks: torch.Tensor, rows: int = 20) -> float:
    """Mean loss over all predicted positions of all blocks."""
    total = sum(
        float(mean_loss(model, blocks[i : i + rows])) * len(blocks[i : i + rows])
        for i in range(0, len(blocks), rows)
    )
    return total / len(blocks)


def greedy(model: Any, ids: list[int], new_tokens: int) -> list[int]:
    """`transformers`' own greedy generation; new tokens only."""
    prompt = torch.tensor([ids])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return [int(token) for token in out[0, len(ids) :]]


def save_json(path: Path, value: Any) -> None:
    """Write JSON."""
    path.write_text(json.dumps(value))
