"""A run's newest checkpoint as a directory that `transformers` loads offline."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from trainer.build import resolve_model, to_transformers
from trainer.checkpoint import newest, read_tensors
from trainer.config import load_run_config
from trainer.errors import UserError
from trainer.restore import require_tokenizer
from trainer.rundir import RunDirectory
from trainer.tokenizer import load_tokenizer, save_for_transformers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export_run(run_dir: Path, out: Path, dtype: str = "float32") -> int:
    """Write config, safetensors and tokenizer of ``run_dir`` into ``out``; returns the checkpoint's step.

    The master weights are written, in ``dtype``: what a narrow recipe rounds on the way into a matrix product is not
    in the file. Raises UserError if ``out`` holds something already or the run has no checkpoint.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: one of {', '.join(DTYPES)}")
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise UserError(f"out={out} exists and is not empty: choose another directory")
    directory = RunDirectory(run_dir)
    config = load_run_config(directory.config)
    checkpoint = newest(directory.checkpoints)
    if checkpoint is None:
        raise UserError(f"{directory.checkpoints} holds no usable checkpoint")
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.eot_token)
    require_tokenizer(checkpoint, tokenizer)
    model_config = resolve_model(config.model, tokenizer.vocab_size, config.data.seq_len)
    tensors = read_tensors(checkpoint.path, "model.")
    ours = {name.removeprefix("model."): tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    hf_config, theirs = to_transformers(model_config, ours, tokenizer.eot)
    out.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(theirs, out, metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(hf_config | {"dtype": dtype}, indent=1) + "\n")
    save_for_transformers(config.data.tokenizer, config.data.eot_token, out)
    return int(checkpoint.meta["step"])
