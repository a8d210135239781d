"""What every rank sees under the Trainer: torchrun callback_ranks.py DIRECTORY, which test_callback.py reads."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from test_callback import DATA, Heard, losses, train
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerControl, TrainerState


def report(name: str, trainer: Trainer, heard: Heard) -> dict[str, Any]:
    wrapped = isinstance(trainer.model_wrapped, DistributedDataParallel)
    mine = {"losses": losses(trainer), "steps": heard.steps[:], "samples": heard.samples[:], "wrapped": wrapped}
    tensors = {f"{step}.{key}": value for step, state in enumerate(heard.states) for key, value in state.items()}
    tensors |= {f"weight.{key}": value for key, value in trainer.model.state_dict().items() if "amax" not in key}
    save_file({key: value.clone() for key, value in tensors.items()}, out / f"{name}-{rank}.safetensors")
    return mine


def gradients(trainer: Trainer, heard: Heard) -> None:
    """Of one batch, with the noise of steps 0, 1 and 0 again on this rank."""
    batch = torch.stack([row["input_ids"] for row in DATA[:4]])
    found = {}
    for number, step in enumerate((0, 1, 0)):
        heard.on_step_begin(trainer.args, TrainerState(global_step=step, max_steps=9), TrainerControl())
        trainer.model.zero_grad()
        trainer.model(input_ids=batch, labels=batch).loss.backward()
        found[str(number)] = trainer.model.model.layers[0].mlp.up_proj.weight.grad.clone()
    save_file(found, out / f"gradients-{rank}.safetensors")


if __name__ == "__main__":
    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    options = {"gradient_accumulation_steps": 2, "save_strategy": "no", "ddp_backend": "gloo"}
    found = {}
    found["shared"] = report("shared", *train("fp8_delayed", out / "shared", **options))
    own = {**options, "recipe_args": {"reduce_amax": False}, "save_strategy": "steps"}
    found["own"] = report("own", *train("fp8_delayed", out / "own", **own))
    try:
        resumed = train("fp8_delayed", out / "own", resume=out / "own" / "checkpoint-2", **own)
        found["resumed"] = report("resumed", *resumed)
    except RuntimeError:  # on both ranks alike: see versions.py
        found["resumed"] = {"failed": traceback.format_exc()}
    stochastic = train("nvfp4", out / "noise", bf16=True, **options)
    found["noise"] = report("noise", *stochastic)
    gradients(*stochastic)
    (out / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
