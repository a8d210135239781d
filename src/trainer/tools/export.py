"""A run's newest checkpoint as a directory that `transformers` loads offline."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor

from ...precision.swiglu import DOWN, GATE, UP, fold, scales_of
from .. import distributed
from ..build import resolve_model, to_transformers
from ..checkpoint import read_tensors
from ..config import restored_model
from ..data.open import open_windows
from ..data.tokenizer import save_for_transformers
from ..errors import UserError, one_line
from ..files import new_directory, write_json
from ..pretrained import DOCUMENT_MASK
from ..state import evaluating
from .restore import open_checkpoint, restore_run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CALIBRATION_WINDOWS = 16  # of the training split


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
    config, checkpoint, tokenizer = open_checkpoint(run_dir)
    config = restored_model(config, checkpoint.meta.get("identity", {}), said)
    model_config = resolve_model(config.model, tokenizer.vocab_size, config.data.seq_len)
    tensors = read_tensors(checkpoint.path, "model.")
    ours = {name.removeprefix("model."): tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    if folded:
        if not any(name.endswith(f".{GATE}.weight") for name in ours):
            raise UserError(f"fold=true: {run_dir} trains a {config.model.arch}, whose MLPs are no SwiGLU")
        for mlp, amax in channel_maxima(run_dir, said).items():
            up, down = f"{mlp}.{UP}.weight", f"{mlp}.{DOWN}.weight"
            ours[up], ours[down] = fold(ours[up], ours[down], scales_of(amax, pow2=True))
    length, end = config.data.seq_len, tokenizer.eot
    hf_config, hf_tensors = to_transformers(model_config, ours, end, length)
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    masked = {DOCUMENT_MASK: True} if config.data.document_mask else {}
    try:
        with new_directory(out, "config.json") as partial:
            save_torch_state_dict(hf_tensors, partial, metadata={"format": "pt"})
            save_for_transformers(config.data.tokenizer, config.data.eot_token, partial, length)
            write_json(partial / "generation_config.json", special | {"max_length": length})
            write_json(partial / "config.json", hf_config | {"dtype": dtype} | masked)
            mode = stat.S_IMODE((partial / "config.json").stat().st_mode)  # as the umask has it; safetensors do not
            for file in partial.iterdir():
                file.chmod(mode)
    except (OSError, SafetensorError) as error:
        raise UserError(f"out={out} cannot be written: {one_line(error)}") from error
    return int(checkpoint.meta["step"])


def channel_maxima(run_dir: Path, said: Sequence[str] = ()) -> dict[str, Tensor]:
    """The largest absolute value of every channel of a SwiGLU over the first training windows, by the path of its MLP.

    Computed without the recipe's quantization.
    """
    try:
        run = restore_run(run_dir, said)
        windows = open_windows(run.config.data, run.tokenizer, "train", CALIBRATION_WINDOWS * run.config.data.seq_len)
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
