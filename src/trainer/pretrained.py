"""Directories that `transformers` wrote or will read: config.json, safetensors, tokenizer. Pickles are not read."""

from __future__ import annotations

import math
import re
import reprlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import UserError, one_line
from .files import read_json

#: Our key of config.json: the documents of a window did not see one another in training. `transformers` passes it over.
DOCUMENT_MASK = "document_mask"
# What no model here has, and none misses: tables that follow from the config.
_HARMLESS = re.compile(r".*\.rotary_emb\.inv_freq|(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
# Scales of activations, which are not quantized here.
_OF_ACTIVATIONS = re.compile(r".*\.(input_scale|input_scale_ub|activation_scale)")
_COMPRESSED = "compressed-tensors"
_FP8_METHODS = (_COMPRESSED, "fp8", "fbgemm_fp8")  # a code times its scale is the weight, in all of them
_FP8_FORMATS = ("float-quantized", "naive-quantized")  # of compressed-tensors
_CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_WEIGHTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_UNSET_LENGTH = 10**9  # a tokenizer's `model_max_length` beyond it means that nobody set one


class PretrainedDirectory:
    """The config and, one at a time, the tensors of a `transformers` checkpoint.

    FP8 codes are multiplied by their scales: one a tensor, a row or a block, as compressed-tensors, fbgemm_fp8 and the
    `fp8` of DeepSeek-V3 store them. Raises UserError if a file is missing or cannot be read, and for every other
    quantization.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path}: no such directory; name one that `save_pretrained` or scripts/export_hf.py wrote")
        self.config: dict[str, Any] = self._json("config.json")
        self._quantization = self._find_quantization()
        self._files = self._find_tensors()
        self._read: set[str] = set()

    @property
    def trained_length(self) -> int | None:
        """The shortest length, in tokens, that config.json and tokenizer_config.json name."""
        lengths = [self.config.get("max_position_embeddings"), self.config.get("n_positions")]
        if (self.path / "tokenizer_config.json").exists():
            lengths.append(self._json("tokenizer_config.json").get("model_max_length"))
        known = [int(n) for n in lengths if type(n) in (int, float) and 0 < n < _UNSET_LENGTH]
        return min(known, default=None)

    def require_read(self, *, tied: bool) -> None:
        """Raises UserError if the files hold a tensor that was not asked for; ``tied``: other than the head's copy."""
        unread = {name for name in self._files.keys() - self._read if not _HARMLESS.fullmatch(name)}
        if self._quantization:
            unread = {name for name in unread if not _OF_ACTIVATIONS.fullmatch(name)}
        if tied and "lm_head.weight" in unread:
            unread.remove("lm_head.weight")
            (embedding,) = (name for name in self._read if name.endswith(("embed_tokens.weight", "wte.weight")))
            if not torch.equal(self._raw("lm_head.weight").float(), self._raw(embedding).float()):
                raise UserError(
                    f"{self.path}: lm_head.weight is not {embedding}, though config.json says that the two are one: "
                    "say tie_word_embeddings=false there, or take the tensor out"
                )
        if unread:
            first, *others = sorted(unread)
            shown = ", ".join([first, *others[:2]]) + (f" and {len(others) - 2} more" if len(others) > 2 else "")
            raise UserError(
                f"{self.path} holds tensors that a {self.config.get('model_type')} built here does not read: {shown}; "
                "without them it would be another model: name a checkpoint that has none such"
            )

    def _find_quantization(self) -> dict[str, Any]:
        """`quantization_config`, empty if there is none. Raises UserError unless it is FP8 with scales."""
        found = self.config.get("quantization_config") or self.config.get("compression_config") or {}
        if not isinstance(found, dict):
            raise UserError(f"{self.path / 'config.json'}: quantization_config is {reprlib.repr(found)}, not an object")
        if not found:
            return {}
        kind = found.get("format")
        method = found.get("quant_method", None if kind is None else _COMPRESSED)
        sparsity = found.get("sparsity_config") or {}
        sparse = not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense"
        if sparse or method not in _FP8_METHODS or (method == _COMPRESSED and kind not in _FP8_FORMATS):
            found_as = reprlib.repr(method) + (f", format {reprlib.repr(kind)}" if kind else "") + ", sparse" * sparse
            raise UserError(
                f"{self.path / 'config.json'}: weights quantized by {found_as} are not read here, only FP8 codes of "
                f"{', '.join(_FP8_METHODS)}: name the checkpoint it was made from, or save it dequantized"
            )
        return found

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return read_json(self.path / name)
        except FileNotFoundError as error:
            raise UserError(f"{self.path} holds no {name}: not a `transformers` checkpoint") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / name} cannot be read: {one_line(error)}") from error

    def _find_tensors(self) -> dict[str, Path]:
        """The file of every tensor, those included that the index passes over."""
        file, index = self.path / "model.safetensors", self.path / "model.safetensors.index.json"
        if index.exists():
            names = self._json(index.name).get("weight_map")
            if not isinstance(names, dict):
                raise UserError(f"{index} has no object weight_map")
            for name, of in names.items():
                if not isinstance(of, str) or of != Path(of).name or not of.endswith(".safetensors"):
                    raise UserError(
                        f"{index}: {reprlib.repr(name)} lies in {reprlib.repr(of)}, "
                        "which is not the name of a safetensors file in the same directory"
                    )
            found = {
                name: self.path / of for of in dict.fromkeys(names.values()) for name in self._names(self.path / of)
            }
            found |= {name: self.path / of for name, of in names.items()}
            if file.exists() and file not in found.values():
                raise UserError(f"{self.path} holds {file.name} and, in {index.name}, others: take one of them away")
            return found
        if not file.exists():
            pickled = list(self.path.glob("*.bin"))
            hint = f" ({pickled[0].name} is a pickle and is not read)" if pickled else ""
            raise UserError(f"{self.path} holds no model.safetensors{hint}")
        return dict.fromkeys(self._names(file), file)

    def _names(self, file: Path) -> list[str]:
        with self._open(file) as opened:
            return list(opened.keys())

    @staticmethod
    def _open(file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: {one_line(error)}") from error

    def tensor(self, name: str) -> Tensor:
        """One full tensor, on the CPU, dequantized to float32 if it is FP8 codes.

        ``name`` counts without its first part too, which a model saved without its head lacks. Raises UserError if
        there is none of that name, or if it is no tensor of finite floating-point numbers.
        """
        if name not in self._files and (bare := name.partition(".")[2]) in self._files:
            name = bare
        raw = self._raw(name)
        if raw.dtype in _CODES:
            raw = self._dequantized(name, raw)
        elif raw.dtype not in _WEIGHTS:
            raise UserError(f"{self.path}: {name} is {_name_of(raw)}, no weights that are read here")
        if not torch.isfinite(raw).all():
            raise UserError(f"{self.path}: {name} holds values that are not finite")
        return raw

    def _raw(self, name: str) -> Tensor:
        if name not in self._files:
            raise UserError(f"{self.path} lacks the tensor {name}")
        self._read.add(name)
        with self._open(self._files[name]) as opened:
            try:
                return opened.get_tensor(name)
            except (OSError, SafetensorError) as error:
                verb = "cannot give" if name in opened.keys() else "lacks"  # noqa: SIM118 (it is no mapping)
                raise UserError(f"{self._files[name]} {verb} the tensor {name}: {one_line(error)}") from error

    def _dequantized(self, name: str, codes: Tensor) -> Tensor:
        if not self._quantization:
            raise UserError(
                f"{self.path}: {name} is {_name_of(codes)}, and config.json has no quantization_config to say its scale"
            )
        named = [scale for scale in (f"{name}_scale", f"{name}_scale_inv") if scale in self._files]
        if len(named) != 1:
            raise UserError(
                f"{self.path}: {name} is {_name_of(codes)}, and there is not one scale for it: "
                f"{name}_scale or {name}_scale_inv"
            )
        scale = self._raw(named[0])
        spread = self._spread(scale.float(), codes) if scale.dtype in (*_WEIGHTS, torch.float8_e8m0fnu) else None
        if spread is None:
            block = f", nor one a block of {self._block()}" if self._block() else ""
            raise UserError(
                f"{self.path}: {named[0]}, {_name_of(scale)} of shape {list(scale.shape)}, is no scale of {name} "
                f"of shape {list(codes.shape)}: neither one number, nor one a row{block}"
            )
        return codes.float() * spread

    def _spread(self, scale: Tensor, codes: Tensor) -> Tensor | None:
        """``scale`` as it multiplies ``codes``: a number, a column, or a number for each."""
        if scale.numel() == 1:
            return scale.reshape(())
        if codes.ndim != 2:
            return None
        rows, columns = codes.shape
        if scale.shape in ((rows,), (rows, 1)):
            return scale.reshape(rows, 1)
        block = self._block()
        if block is None or scale.shape != (math.ceil(rows / block[0]), math.ceil(columns / block[1])):
            return None
        return scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]

    def _block(self) -> list[int] | None:
        """Rows and columns of the block that has one scale, as `fp8` or compressed-tensors say it."""
        groups = self._quantization.get("config_groups")
        weights = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
        given = [one.get("block_structure") for one in weights if isinstance(one, dict)]
        for block in (self._quantization.get("weight_block_size"), *given):
            sizes = [int(n) for n in re.findall(r"\d+", str(block))]
            if len(sizes) == 2 and all(sizes):
                return sizes
        return None


def _name_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
