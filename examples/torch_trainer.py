"""`fusedstep.torch.AdamW` in the Trainer of Hugging Face: ``optimizer_cls_and_kwargs``.

A small GPT-2 with random first weights predicts the next character of the help texts that come
with Python (`pydoc_data`); nothing is downloaded. It is trained twice, from the same weights and
with the same batches, warm-up, decay and clipping: with `torch.optim.AdamW` (``fused=True``) and
with ours. Needs ``pip install transformers accelerate``.

What to expect: the same loss with either.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

import fusedstep.torch

CONTEXT = 64


def samples(text: str) -> tuple[list[dict[str, torch.Tensor]], int]:
    """Return pieces of the text as the Trainer takes them, and how many characters there are."""
    alphabet = sorted(set(text))
    places = {character: i for i, character in enumerate(alphabet)}
    numbers = torch.tensor([places[character] for character in text])
    pieces = numbers[: len(numbers) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return [{"input_ids": piece, "labels": piece} for piece in pieces], len(alphabet)


def train(optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]], steps: int) -> float:
    """Return the mean loss of the last ten steps."""
    set_seed(0)
    dataset, characters = samples("".join(topics.values()))
    config = GPT2Config(
        vocab_size=characters,
        n_positions=CONTEXT,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 10,
            max_grad_norm=1.0,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        trainer = Trainer(
            GPT2LMHeadModel(config),
            arguments,
            train_dataset=dataset,
            optimizer_cls_and_kwargs=optimizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="50 steps instead of 500")
    parser.add_argument("--json", action="store_true", help="print for machines")
    arguments = parser.parse_args()
    options = {"lr": 3e-3, "weight_decay": 0.1}
    contenders = {
        "torch.optim.AdamW": (torch.optim.AdamW, {"fused": True, **options}),
        "fusedstep.torch.AdamW": (fusedstep.torch.AdamW, options),
    }
    found = {}
    for name, optimizer in contenders.items():
        found[name] = train(optimizer, 50 if arguments.quick else 500)
        if not arguments.json:
            print(f"{name:22} loss {found[name]:.4f}", flush=True)
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
