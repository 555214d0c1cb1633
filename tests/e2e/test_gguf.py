"""A model that is one GGUF file: the owner reads it once, others fetch ranges of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from confidantd.models.imported import INDEX
from tests import reference
from tests.e2e.devices import Device, swarm
from tests.e2e.small_models import TEXT, byte_tokenizer, copy_model
from tests.e2e.test_bad_input import one_line
from tests.gguf_files import describe_tokenizer, write_gguf

NAMES = ("anna", "ben")
NEW_TOKENS = 24
TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Device]]:
    with swarm(tmp_path_factory.mktemp("gguf"), len(NAMES), "--api-port", "0") as found:
        yield found


class Made:
    """A GGUF file, what its weights are worth in `transformers`, and its tokenizer."""

    def __init__(self, source: Path, folder: Path, kind: str, pre: str, **fields: Any) -> None:
        loaded: Any = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
        self.model, self.source = loaded.eval(), source
        text = (source / "tokenizer.json").read_text()
        self.tokenizer = Tokenizer.from_str(text)
        describe = describe_tokenizer(json.loads(text), pre=pre, **fields)

        def all_of_it(writer: Any) -> None:
            describe(writer)
            writer.add_chat_template(TEMPLATE)

        self.file = write_gguf(
            folder / f"{source.name}-{kind}.gguf", loaded, lambda _: kind, all_of_it, made_up=False
        )

    def as_folder(self, folder: Path) -> Path:
        """The same weights in Hugging Face form."""
        copy_model(self.source, folder)
        self.model.save_pretrained(folder)
        return folder

    def reference(self, prompt: str) -> list[int]:
        """Greedy tokens of `transformers`."""
        ids = torch.tensor([self.tokenizer.encode(prompt).ids])
        found = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        return [int(token) for token in found[0, ids.shape[1] :]]


def stories(folder: Path, kind: str) -> Made:
    """A real model, with a tokenizer of SentencePiece's kind."""
    source = reference.MODELS / "stories260K"
    if not source.is_dir():
        pytest.skip("the real model stories260K is not on this machine")
    return Made(source, folder, kind, "", bos_token_id=1, eos_token_id=1, unknown_token_id=0)


def generate(device: Device, file: Path, prompt: str, *options: str) -> dict[str, Any]:
    """The answer."""
    return device.json(
        "generate", str(file), "--prompt", prompt, "--max-new-tokens", str(NEW_TOKENS), *options
    )


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_one_device_and_two_say_what_transformers_says(
    devices: list[Device], tmp_path: Path, kind: str
) -> None:
    """A real model: the tokens are those of the weights in the file."""
    made, prompt = stories(tmp_path, kind), "Once upon a time"
    wanted = made.reference(prompt)
    alone = generate(devices[0], made.file, prompt, "--devices", "anna")
    assert alone["tokens"] == wanted
    both = generate(devices[0], made.file, prompt, "--devices", "anna,ben")
    assert both["tokens"] == wanted
    assert len(both["stages"]) == len(NAMES)
    assert alone["text"].startswith(", there was a little girl named Lily")


@pytest.fixture(scope="module")
def random(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A random Llama with a tied table and Llama 3's positions, whose tokens are bytes and th."""
    folder = tmp_path_factory.mktemp("random")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
        tie_word_embeddings=True, initializer_range=0.08, eos_token_id=257, bos_token_id=None,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    byte_tokenizer(folder / "model")
    tokenizer = json.loads((folder / "model" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["th"], tokenizer["model"]["merges"] = 256, [["t", "h"]]
    tokenizer["added_tokens"][0]["id"] = 257
    (folder / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return Made(folder / "model", folder, "Q8_0", "gpt-2", eos_token_id=257)


def test_it_is_read_once(devices: list[Device], random: Made) -> None:
    """Its folder stays; the file's weights are nowhere else on the owner's disk."""
    for _ in range(2):
        plan = devices[0].json("plan", str(random.file), "--generate", "--devices", "anna,ben")
        assert plan["model"] == random.file.name
        assert [stage["embedding"] for stage in plan["stages"]] == [True, False]
    folders = (devices[0].home / "imported").iterdir()
    (folder,) = (f for f in folders if str(random.file) in (f / INDEX).read_text())
    written = folder.stat().st_mtime_ns
    generate(devices[0], random.file, "The devices", "--devices", "anna,ben")
    assert folder.stat().st_mtime_ns == written
    sizes = sum(path.stat().st_size for path in folder.iterdir())
    assert sizes < random.file.stat().st_size // 2
    assert not (devices[1].home / "imported").exists()


def test_a_tied_table_in_blocks(devices: list[Device], random: Made) -> None:
    """One device looks up its embedding, the other multiplies by it as the head; or one does both,
    and fetches it once.
    """
    alone = generate(devices[0], random.file, "The devices", "--devices", "anna")
    both = generate(devices[0], random.file, "The devices", "--devices", "anna,ben")
    other = generate(devices[0], random.file, "The devices", "--devices", "ben")
    assert other["tokens"] == both["tokens"] == alone["tokens"]
    assert alone["completion_tokens"] == NEW_TOKENS


def test_it_is_served_by_its_name(devices: list[Device], random: Made) -> None:
    answer = devices[0].json("serve", str(random.file), "--detach", "--devices", "anna,ben")
    assert answer["model"] == random.file.name
    prompt = random.tokenizer.encode("[hi]").ids
    found = openai.OpenAI(base_url=answer["base_url"], api_key="any").chat.completions.create(
        model=random.file.name, messages=[{"role": "user", "content": "hi"}], temperature=0,
        max_tokens=NEW_TOKENS,
    )  # fmt: skip
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(prompt)
    wanted = generate(devices[0], random.file, "[hi]", "--devices", "anna,ben")
    assert found.choices[0].message.content == wanted["text"]
    devices[0].json("jobs", "cancel", answer["job"])


def test_it_can_be_quantised_further(devices: list[Device], random: Made) -> None:
    """From what its weights are worth."""
    found = generate(
        devices[0], random.file, "The devices", "--quantise", "int4:16", "--devices", "anna,ben"
    )
    assert found["completion_tokens"] == NEW_TOKENS


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_from_it_equals_training_from_its_weights(
    devices: list[Device], random: Made, tmp_path: Path, method: str
) -> None:
    """They are computed with in float32; what is trained is a model in Hugging Face form."""
    losses = []
    folder = random.as_folder(tmp_path / "folder")
    for number, model in enumerate((random.file, folder)):
        events = devices[0].events(
            "train", str(model), "--data", str(TEXT), "--output", str(tmp_path / str(number)),
            "--method", method, "--steps", "3", "--batch-size", "2", "--sequence-length", "32",
            "--devices", "anna,ben", "--no-shuffle",
        )  # fmt: skip
        assert events[-1]["event"] == "done", events[-1]
        losses.append([event["loss"] for event in events if event["event"] == "step"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    if method == "full":
        trained = reference.load(tmp_path / "0")
        assert trained.config.tie_word_embeddings


def test_an_adapter_beside_it(devices: list[Device], random: Made, tmp_path: Path) -> None:
    """Trained on it, and computed beside its blocks."""
    devices[0].events(
        "train", str(random.file), "--data", str(TEXT), "--output", str(tmp_path / "adapter"),
        "--method", "lora", "--steps", "3", "--batch-size", "2", "--sequence-length", "32",
        "--learning-rate", "0.05", "--devices", "anna",
    )  # fmt: skip
    adapter = ("--adapter", str(tmp_path / "adapter"))
    alone = generate(devices[0], random.file, "The devices", *adapter, "--devices", "anna")
    both = generate(devices[0], random.file, "The devices", *adapter, "--devices", "anna,ben")
    plain = generate(devices[0], random.file, "The devices", "--devices", "anna")
    assert alone["tokens"] == both["tokens"] != plain["tokens"]


def test_bad_files_are_one_line(devices: list[Device], random: Made, tmp_path: Path) -> None:
    good, file = random.file.read_bytes(), tmp_path / "model.gguf"
    for content, word in (
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (good[: len(good) // 2], "damaged"),
        (good[:300], "its header is longer than"),
        (good.replace(b"llama", b"mamba"), "mamba"),
        (good.replace(b"gpt-2", b"gpt-9"), "gpt-9"),
        (good.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_ab.weight"), "up_proj"),
    ):
        file.write_bytes(content)
        for command in (("generate", "--prompt", "x"), ("serve", "--detach"), ("plan",)):
            line = one_line(devices[0].cli(command[0], str(file), *command[1:]))
            assert word in line
            assert str(devices[0].home) not in line
    file.unlink()
    assert "no model folder" in one_line(devices[0].cli("generate", str(file), "--prompt", "x"))
