"""How a matrix is cut into blocks for the programs of a kernel. Bits do not depend on their sizes."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...scaling import TENSOR, Tile
from ...transforms import Hadamard
from .device import RECORDING, capability

MAX_TILE = 128 * 128  # elements that one program holds


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks [block_r, block_c] of a matrix and the tiles [tall, wide] in them: powers of two, constants of kernels.

    A tile that spans all rows or columns of the matrix (full_r, full_c) is as large as the block here; its index in its
    grid is 0.
    """

    tall: int
    wide: int
    full_r: bool
    full_c: bool
    block_r: int
    block_c: int
    fused: bool  # every tile lies in one block
    warps: int = 0  # 0: by the number of elements

    @property
    def num_warps(self) -> int:
        return self.warps or min(16, max(4, self.block_r * self.block_c // 1024))

    def programs(self, rows: int, cols: int) -> int:
        return -(-rows // self.block_r) * -(-cols // self.block_c)


class BlockSize(NamedTuple):
    """About how large a program's blocks are, and by how many warps they are computed."""

    elements: int = 4096
    warps: int = 0  # 0: by the number of elements


def blocks(
    tile: Tile, rows: int, cols: int, *, rows_adjoin: bool = False, group: int = 1, size: BlockSize | None = None
) -> Blocks:
    """Blocks of some 4096 elements: wide ones where a row is contiguous, else (``rows_adjoin``) about square.

    ``group``: how many columns a transform takes together.
    """
    elements, warps = size or BlockSize()
    tall, wide = tile
    low_r, low_c = max(tall, 1), max(wide, group, 1)
    high_r, high_c = max(low_r, _power_above(rows)), max(low_c, _power_above(cols), 2)
    if tile == Tile(1, -1) and high_c <= (512 if rows_adjoin else 8192):  # a complete row in a block
        block_r, block_c = min(high_r, 32 if rows_adjoin else max(1, elements // high_c)), high_c
    else:
        block_c = min(high_c, max(low_c, 64 if rows_adjoin else 128))
        block_r = min(high_r, max(low_r, elements // block_c))
    if rows_adjoin and group > 1 and size is None:
        # A load gives a thread 8 elements of a column, and a warp 8 columns: with few rows the columns of a group meet
        # in few warps, so that a transform's stages are shuffles and not trips through shared memory.
        block_r, warps = min(high_r, max(low_r, 32)), 2 if block_c <= 64 else 4
    if min(tall, wide) > 0 and tall * wide >= MAX_TILE and not warps:
        warps = 8  # of 16, sm_100's assembler gives a thread 64 registers, and spills
    full_r, full_c = tall < 0, wide < 0
    return Blocks(
        tall=block_r if full_r else tall,
        wide=block_c if full_c else wide,
        full_r=full_r,
        full_c=full_c,
        block_r=block_r,
        block_c=block_c,
        fused=(not full_r or block_r >= rows) and (not full_c or block_c >= cols),
        warps=warps,
    )


def blocks_of(x: Tensor, tile: Tile, transform: Hadamard | None, size: BlockSize | None = None) -> Blocks:
    group = transform.size if transform is not None else 1
    rows_adjoin = x.stride(1) != 1 and x.stride(0) == 1
    return blocks(tile, *x.shape, rows_adjoin=rows_adjoin, group=group, size=size)


def _power_above(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def near(x: Tensor, cut: Blocks, *, both: bool = False) -> bool:
    """Whether 32 bits hold what lies between the elements of a block: of x, of what is made of it, and of its transpose
    (``both``).
    """
    rows, cols = x.shape
    tall, wide = max(x.stride(0), cols), max(x.stride(1), rows if both else 1)
    return cut.block_r * tall + cut.block_c * wide < 2**31


def tile_fits(tile: Tile) -> bool:
    """Whether kernels take such tiles."""
    if any(extent > 0 and extent & (extent - 1) for extent in tile):
        return False
    return tile in (TENSOR, Tile(1, -1), Tile(-1, 1)) or (min(tile) > 0 and tile.outer * tile.inner <= MAX_TILE)


CANDIDATES = (BlockSize(2048, 4), BlockSize(4096, 4), BlockSize(4096, 8), BlockSize(8192, 8))


def tuned(kind: tuple[object, ...], device: torch.device, plan: Callable[[BlockSize | None], Any], *args: Any) -> Any:
    """The plan of the fastest blocks, which are measured by ``plan(size).run(*args)``."""
    return plan(fastest("/".join(map(str, kind)), device, lambda size: plan(size).run(*args)))


def fastest(kind: str, device: torch.device, run: Callable[[BlockSize | None], object]) -> BlockSize | None:
    """The blocks of a kind of launch on this architecture, None for what ``blocks`` says.

    With NARROWGAUGE_TUNE=1 in the environment the candidates are measured at the first launch of a kind, by ``run``,
    and the best is kept for later processes, in triton's cache directory.
    """
    if device.type != "cuda" or RECORDING.get() is not None:
        return None
    major, minor = capability(device)
    name = f"sm_{major}{minor} {kind}"
    known = _tuned()
    if name not in known and os.environ.get("NARROWGAUGE_TUNE") == "1":
        times = {size: _milliseconds(functools.partial(run, size)) for size in (None, *CANDIDATES)}
        known[name] = min(times, key=lambda size: times[size])
        path = _tuned_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(known, indent=1), encoding="utf-8")
        scratch.replace(path)
    return known.get(name)


def _tuned_path() -> Path:
    import triton  # type: ignore[import-untyped]

    return Path(triton.knobs.cache.dir) / "narrowgauge_blocks.json"


@functools.cache
def _tuned() -> dict[str, BlockSize | None]:
    """What was measured, by architecture and kind of launch."""
    path = _tuned_path()
    if not path.exists():
        return {}
    return {
        name: None if pair is None else BlockSize(*pair)
        for name, pair in json.loads(path.read_text(encoding="utf-8")).items()
    }


def _milliseconds(call: Callable[[], object], times: int = 20) -> float:
    """Of one call on the device's clock, the median of three."""
    call()
    measured: list[float] = []
    for _ in range(3):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        for _ in range(times):
            call()
        last.record()
        last.synchronize()
        measured.append(first.elapsed_time(last) / times)
    return sorted(measured)[1]
