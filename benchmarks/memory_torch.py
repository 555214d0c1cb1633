"""`python -m benchmarks.memory_torch MODEL METHOD BATCH MICROBATCHES LENGTH`: peak memory in bytes.

Of three steps of single-process torch + transformers (+ peft) with gradient accumulation, in
a process of its own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.memory_swarm import STEPS
from confidantd.worker.memory import peak_memory_bytes

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def main(path: str, method: str, batch: int, microbatches: int, length: int) -> None:
    """Prints the peak."""
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)
    for _ in range(STEPS):
        ids = torch.randint(0, model.config.vocab_size, (batch, length))
        for rows in ids.chunk(microbatches):
            (model(input_ids=rows, labels=rows).loss / microbatches).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(peak_memory_bytes())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
