"""A run's newest checkpoint as a directory that `transformers` loads offline."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor

from .. import distributed
from ..build import open_windows, resolve_model, to_transformers
from ..checkpoint import newest, read_tensors
from ..data.tokenizer import load_tokenizer, save_for_transformers
from ..errors import UserError, one_line
from ..files import sync_directory, write_json
from ..pretrained import DOCUMENT_MASK
from ..rundir import RunDirectory, require_tokenizer
from ..state import evaluating
from .restore import open_config, restore_run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CALIBRATION_WINDOWS = 16  # of the training split
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"  # children of a SwiGLU


def export_run(
    run_dir: Path, out: Path, dtype: str = "float32", *, folded: bool = False, said: Sequence[str] = ()
) -> int:
    """Write config, safetensors and tokenizer of ``run_dir`` into ``out``; returns the checkpoint's step.

    The length it was trained at stands there as the model's and the tokenizer's longest, in tokens; learned positions
    beyond it are kept.

    The parameters are written, in ``dtype``: what a narrow recipe rounds on the way into a matrix product is not in the
    file, nor is a master that ``optim.moments`` keeps beside BF16 parameters. ``folded``: the scales of Smooth-SwiGLU's
    channels (arXiv 2409.12517), powers of two from the largest values over some text, are taken into the weights on
    both sides of it: the same function, bit for bit, whose down-projection reads channels of like size. ``said``: as
    in ``restore_run``.

    Raises UserError if ``out`` holds something already or cannot be written, the run has no checkpoint, or there is no
    SwiGLU to fold.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: one of {', '.join(DTYPES)}")
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise UserError(f"out={out} exists and is not empty: choose another directory")
    directory = RunDirectory(run_dir)
    config = open_config(directory)
    checkpoint = newest(directory.checkpoints)
    if checkpoint is None:
        raise UserError(f"{directory.checkpoints} holds no usable checkpoint")
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.eot_token)
    require_tokenizer(checkpoint, tokenizer)
    model_config = resolve_model(config.model, tokenizer.vocab_size, config.data.seq_len)
    tensors = read_tensors(checkpoint.path, "model.")
    ours = {name.removeprefix("model."): tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    if folded:
        if not any(name.endswith(f".{GATE}.weight") for name in ours):
            raise UserError(f"fold=true: {run_dir} trains a {config.model.arch}, whose MLPs are no SwiGLU")
        for mlp, amax in channel_maxima(run_dir, said).items():
            up, down = f"{mlp}.{UP}.weight", f"{mlp}.{DOWN}.weight"
            ours[up], ours[down] = fold(ours[up], ours[down], amax)
    length, end = config.data.seq_len, tokenizer.eot
    hf_config, theirs = to_transformers(model_config, ours, end, length)
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    masked = {DOCUMENT_MASK: True} if config.data.document_mask else {}
    with _whole(out) as partial:
        save_torch_state_dict(theirs, partial, metadata={"format": "pt"})
        save_for_transformers(config.data.tokenizer, config.data.eot_token, partial, length)
        write_json(partial / "generation_config.json", special | {"max_length": length})
        write_json(partial / "config.json", hf_config | {"dtype": dtype} | masked)
    return int(checkpoint.meta["step"])


def fold(up_weight: Tensor, down_weight: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Up-projection rows divided by scales, down-projection columns times them: the same function.

    ``amax``: [channels], float32. A scale is the power of two at or below it, 1 for a zero, subnormal or infinite one:
    exact, while nothing leaves the range of the dtype.
    """
    power = (amax.view(torch.int32) & 0x7F800000).view(torch.float32)  # its exponent bits alone
    normal = (amax >= torch.finfo(torch.float32).tiny) & amax.isfinite()
    factor = torch.where(normal, power, 1.0).to(up_weight.dtype)
    return up_weight / factor[:, None], down_weight * factor


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A directory to write into that becomes ``out``, or whose files do, ``config.json`` last. Raises UserError."""
    stands = out.is_dir()
    name = f"{out.name}.{os.getpid()}.incomplete"
    partial = out / name if stands else out.with_name(name)
    try:
        partial.mkdir(parents=True)
        yield partial
        mode = stat.S_IMODE((partial / "config.json").stat().st_mode)  # as the umask has it; safetensors do not
        for file in partial.iterdir():
            file.chmod(mode)
            with file.open("rb") as written:
                os.fsync(written.fileno())
        if stands:
            for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
                file.replace(out / file.name)
        else:
            partial.replace(out)
        sync_directory(out if stands else out.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"out={out} cannot be written: {one_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def channel_maxima(run_dir: Path, said: Sequence[str] = ()) -> dict[str, Tensor]:
    """The largest absolute value of every channel of a SwiGLU over the first training windows, by the path of its MLP.

    Computed without the recipe's quantization.
    """
    try:
        run = restore_run(run_dir, said)
        windows = open_windows(run.config.data, run.tokenizer, "train", CALIBRATION_WINDOWS * run.context)
        maxima: dict[str, Tensor] = {}

        def note(mlp: str, h: Tensor) -> None:
            amax = h.detach().abs().flatten(0, -2).amax(0).float()
            maxima[mlp] = torch.maximum(maxima[mlp], amax) if mlp in maxima else amax

        for name, module in run.state.model.named_modules():
            mlp, _, child = name.rpartition(".")
            if child == DOWN:
                module.register_forward_pre_hook(lambda module, inputs, mlp=mlp: note(mlp, inputs[0]))
        with evaluating(run.state.model), run.state.plan.high_precision():
            for index in range(min(CALIBRATION_WINDOWS, windows.num_windows)):
                run.state.model(torch.from_numpy(windows.window(index)[None, :-1]).to(run.world.device))
        return {mlp: amax.cpu() for mlp, amax in maxima.items()}
    finally:
        distributed.finish()
