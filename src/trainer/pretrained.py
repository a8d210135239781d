"""Directories that `transformers` wrote or will read: config.json, safetensors, tokenizer. Pickles are not read."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.errors import UserError, one_line
from trainer.files import read_json


class PretrainedDirectory:
    """The config and, one at a time, the tensors of a `transformers` checkpoint.

    Raises UserError if a file is missing or cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path}: no such directory; name one that `save_pretrained` or scripts/export_hf.py wrote")
        self.config: dict[str, Any] = self._json("config.json")
        self._files = self._find_tensors()

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return read_json(self.path / name)
        except FileNotFoundError as error:
            raise UserError(f"{self.path} holds no {name}: not a `transformers` checkpoint") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / name} cannot be read: {one_line(error)}") from error

    def _find_tensors(self) -> dict[str, Path]:
        if (self.path / "model.safetensors.index.json").exists():
            names = self._json("model.safetensors.index.json").get("weight_map")
            if not isinstance(names, dict):
                raise UserError(f"{self.path}/model.safetensors.index.json has no object weight_map")
            for name, file in names.items():
                if not isinstance(file, str) or file != Path(file).name or not file.endswith(".safetensors"):
                    raise UserError(
                        f"{self.path}/model.safetensors.index.json: {reprlib.repr(name)} lies in {reprlib.repr(file)}, "
                        "which is not the name of a safetensors file in the same directory"
                    )
            return {name: self.path / file for name, file in names.items()}
        file = self.path / "model.safetensors"
        if not file.exists():
            pickled = list(self.path.glob("*.bin"))
            hint = f" ({pickled[0].name} is a pickle and is not read)" if pickled else ""
            raise UserError(f"{self.path} holds no model.safetensors{hint}")
        with self._open(file) as opened:
            return dict.fromkeys(opened.keys(), file)

    @staticmethod
    def _open(file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: {one_line(error)}") from error

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, on the CPU. Raises UserError if there is none of that name."""
        if name not in self._files:
            raise UserError(f"{self.path} lacks the tensor {name}")
        with self._open(self._files[name]) as opened:
            try:
                return opened.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self._files[name]} lacks the tensor {name}: {one_line(error)}") from error
