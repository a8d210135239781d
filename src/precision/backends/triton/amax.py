"""What kernels read of a matrix, and the amaxes of its tiles."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from ...quantize import TORCH
from ...scaling import Tile
from ...swiglu import Hidden
from ...transforms import Hadamard
from .blocks import blocks, blocks_of, near, tile_fits
from .device import hardware, programs, runs_on
from .launch import Launcher, number, recall, remember, start
from .specs import DTYPES

BOTH_SIDE = 64  # of the blocks in which x and its transpose are read together, at least


def sources(x: Tensor | Hidden) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """The pointers that a kernel reads a matrix by (x, or gate, up, d), and along which dimension d lies; -1: no d."""
    if isinstance(x, Hidden):
        return x.gate, x.up, x.d, -1 if x.d is None else x.along
    return x, None, None, -1


def computed(x: Tensor | Hidden, transform: Hadamard | None) -> Tensor:
    """In plain torch, what kernels quantize."""
    y = x.computed() if isinstance(x, Hidden) else x
    return y if transform is None else transform.left(y)


@functools.cache
def signs_of(transform: Hadamard | None, device: torch.device) -> Tensor | None:
    return None if transform is None else torch.tensor(transform.vector(), dtype=torch.float32, device=device)


def amax_launcher(
    x: Tensor,
    along: int,
    tile: Tile,
    transform: Hadamard | None = None,
    *,
    parts: bool = False,
    columns: bool = False,
) -> Launcher:
    """Of ``amax_kernel``; x and ``along`` of ``sources``.

    Args:
        parts: that of the tensor, in as many FP32 parts as programs, a power of two.
        columns: those of columns, too.
    """
    from .kernels import amax_kernel

    (rows, cols), cut = x.shape, blocks_of(x, tile, transform)
    if columns:
        cut = replace(blocks(tile, rows, cols), block_r=BOTH_SIDE, block_c=BOTH_SIDE, wide=BOTH_SIDE)
    most = programs(cut.programs(rows, cols), cut.num_warps, x.device)
    if parts:
        most = min(1024, 1 << (most.bit_length() - 1))
    return Launcher(
        kernel=amax_kernel,
        programs=most,
        numbers=(rows, cols, *x.stride(), *tile.grid(rows, cols)),
        constexprs={
            "ALONG": along,
            "PARTS": parts,
            "B": cut,
            "HADAMARD": transform.size if transform is not None else 0,
            "HARDWARE": hardware(x.device).fp8,
        },
        num_warps=cut.num_warps,
        device=x.get_device(),
    )


def tile_amax(x: Tensor | Hidden, tile: Tile, transform: Hadamard | None = None) -> Tensor:
    """As ``precision.quantize.amax`` of ``transform.left(x)``, bit for bit."""
    of, up, d, along = sources(x)
    if not runs_on(of.device):
        return TORCH.amax(computed(x, transform), tile)
    transform_number = None if transform is None else number(transform)
    key = "amax", tile, of.shape, of.stride(), of.dtype, of.device, up is None, along, transform_number
    plan = recall(key)
    if plan is None:
        known = of.numel() > 0 and tile_fits(tile)
        if known and of.dtype not in DTYPES:
            assert isinstance(x, Tensor)
            return tile_amax(x.float(), tile, transform)
        if not known or not near(of, blocks_of(of, tile, transform)):
            return TORCH.amax(computed(x, transform), tile)
        allocate = torch.zeros if min(tile) < 0 else torch.empty  # many blocks share a tile, or none do
        grid, signs = tile.grid(*of.shape), signs_of(transform, of.device)
        plan = remember(key, (amax_launcher(of, along, tile, transform), allocate, grid, signs))
    launcher, allocate, grid, signs = plan
    out = allocate(grid, dtype=torch.int32, device=of.device)
    start(launcher, of, up, d, out, None, signs)
    return out.view(torch.float32)  # type: ignore[no-any-return]
