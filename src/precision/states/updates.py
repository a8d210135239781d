"""Update rules: how a step changes the parameters and the optimizer's state."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from ..noise import base_key, step_key
from ..spec import Rounding
from .adamw import REFERENCE, AdamBackend, Encoded, Update
from .adamw_cpu import CpuAdam
from .adamw_triton import TritonAdam
from .codecs import FP32, Codec, Kahan, Parts, Plain, Scaled
from .moments import STANDARD, Moments


class UpdateRule(Protocol):
    """Builds the optimizer of a recipe.

    The state of every parameter must exist when ``build`` returns, as plain tensors or DTensors in
    ``optimizer.state[parameter]``: a checkpoint then loads in place, without a pickle and without a dry-run step.
    """

    def build(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        moments: Moments,
        seed: int,
        backend: str,
    ) -> Optimizer:
        """The optimizer of ``groups`` of named parameters.

        Args:
            moments: the codecs of its states. Raises ValueError where the rule cannot.
            seed: of rounding noise.
            backend: wanted for updates, or ``auto``.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """AdamW with decoupled decay (arXiv 1711.05101).

    With FP32 parameters and moments by ``torch.optim``, fused unless ``fused`` is false; all else by ``CodecAdamW``.
    """

    fused: bool = True

    def build(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        moments: Moments = STANDARD,
        seed: int = 0,
        backend: str = "auto",
    ) -> Optimizer:
        groups = list(groups)
        codecs = moments.m, moments.v, moments.master or FP32
        if any(codec != FP32 for codec in codecs) or any(_dtype_of(group) != torch.float32 for group in groups):
            return CodecAdamW(groups, lr=lr, betas=betas, eps=eps, moments=moments, seed=seed, backend=backend)
        optimizer = torch.optim.AdamW(
            groups, lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=self.fused, foreach=False
        )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                # What torch's AdamW would create at its first step; a fused update has its step counter on the device.
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device if self.fused else "cpu"),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        return optimizer


def _dtype_of(group: dict[str, Any]) -> torch.dtype:
    first = group["params"][0]
    parameter: Tensor = first[1] if isinstance(first, tuple) else first
    return parameter.dtype


_M, _V, _MASTER = "exp_avg", "exp_avg_sq", "master"
_SLOTS = {_M: 16, _V: 17, _MASTER: 18}  # of rounding noise: a linear's operands have the lower ones


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A parameter's matrix on this rank and its states, as [rows, cols]: views, so that writing changes both.

    ``has_master``: whether the weights are in a state of their own, ``master``, and not in the parameter.
    """

    name: str
    rows: int
    cols: int
    row_offset: int
    codecs: tuple[Codec, Codec, Codec]
    parts: tuple[Parts, Parts, Parts]
    has_master: bool


class CodecAdamW(Optimizer):
    """AdamW whose moments and weights are stored by codecs; computes in FP32, as ``precision.states.adamw`` says.

    State of a parameter: ``step``; the parts of ``exp_avg``, ``exp_avg_sq`` and, where the weights are not the
    parameter itself or have a residual, of ``master``, as ``exp_avg_codes``, ``exp_avg_scales`` and so on. Parts with
    rows are DTensors sharded as the parameter is. Parameters of one dimension have FP32 states, and FP32 masters where
    those of matrices have scales. Rounding noise is a function of (seed, number of the update, name, position in the
    parameter).

    Args:
        groups: of parameters, named or not; a name is needed where rounding is stochastic.
        moments: the codecs of the states.
        seed: of rounding noise.
        backend: ``auto``, ``cpu``, ``triton`` or ``reference``.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        moments: Moments = STANDARD,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(list(groups), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.moments = moments
        self.places: dict[Tensor, Place] = {}
        keys: list[Tensor] = []
        self._keyed: dict[tuple[Tensor, int], int] = {}  # (parameter, which of m, v, w) -> row of the keys
        for group in self.param_groups:
            names = group.get("param_names", [""] * len(group["params"]))
            for name, parameter in zip(names, group["params"], strict=True):
                place = self._place(name, parameter)
                self.places[parameter] = place
                for which, codec in enumerate(place.codecs):
                    if codec.stochastic:
                        if not name:
                            raise ValueError(f"{codec} rounds stochastically: its noise goes by the parameter's name")
                        self._keyed[parameter, which] = len(keys)
                        keys.append(base_key(seed, name, [*_SLOTS.values()][which]))
        device = next(iter(self.places)).device
        self._keys = torch.stack(keys).to(device) if keys else None
        self._counted: list[Tensor] = []  # the parameters of the last update
        codecs = dict.fromkeys(codec for place in self.places.values() for codec in place.codecs)
        beta1 = min(float(group["betas"][0]) for group in self.param_groups)
        self.choice = choose_update(device, backend, codecs=codecs, beta1=beta1)
        self.backend: AdamBackend = self.choice.backend
        with torch.no_grad():
            self._encode_masters()

    def _place(self, name: str, parameter: Tensor) -> Place:
        weight = local(parameter.detach())
        rows = weight.shape[0] if weight.dim() else 1
        cols = math.prod(parameter.shape[1:])
        m, v, master = self.moments.m, self.moments.v, self.moments.master
        if parameter.dim() < 2:
            m = v = FP32
        itself: Codec = Plain(dtype=parameter.dtype)
        w = itself if master is None else master
        has_master = not isinstance(w, (Plain, Kahan))
        if has_master and parameter.dim() < 2:
            w = FP32
        state: dict[str, Tensor] = {"step": torch.zeros((), dtype=torch.float32)}
        states: list[Parts] = []
        for key, codec in zip(_SLOTS, (m, v, w), strict=True):
            parts: Parts = {}
            for part, (shape, dtype) in codec.layout(rows, cols).items():
                if key == _MASTER and part == "" and not has_master:
                    assert weight.dtype == dtype, f"{name} is {weight.dtype}, its codec has {dtype}"
                    parts[part] = weight.view(rows, cols)
                    continue
                parts[part] = torch.zeros(shape, dtype=dtype, device=weight.device)
                stored = parts[part] if parameter.dim() != 1 or not shape else parts[part].view(rows)
                stored = stored.view(weight.shape) if stored.shape == (rows, cols) else stored
                state[f"{key}_{part}" if part else key] = _sharded_as(stored, parameter) if shape else stored
            states.append(parts)
        self.state[parameter] = state
        return Place(name, rows, cols, _row_offset(parameter), (m, v, w), (states[0], states[1], states[2]), has_master)

    def _encode_masters(self) -> None:
        """Masters start at the parameters: rounded to nearest, whatever updates do."""
        chosen = [(p, place) for p, place in self.places.items() if place.has_master]
        if not chosen:
            return
        weights = [local(parameter).view(place.rows, place.cols).float() for parameter, place in chosen]
        zero = weights[0].new_zeros(())
        tops = torch.stack([weight.abs().amax() if weight.numel() else zero for weight in weights])
        for (parameter, place), weight, top in zip(chosen, weights, self._over_ranks(tops), strict=True):
            codec = place.codecs[2]
            for name, part in _nearest(codec).encode(weight, amax=top if codec.per_tensor else None).items():
                place.parts[2][name].copy_(part)
            local(parameter).view(place.rows, place.cols).copy_(codec.decode(place.parts[2]))

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, gate: Tensor | None = None
    ) -> None:
        """One update of every parameter that has a gradient.

        ``gate`` FP32 [2], on the device: what gradients are multiplied by, and 1, or 0 for an update that changes
        nothing but its number: whoever learns that it was left out calls ``uncount`` before the next one.
        """
        assert closure is None
        updates, seen = [], []
        gates: dict[torch.dtype, Tensor] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["step"] += 1
                    dtype = parameter.grad.dtype
                    if gate is not None and dtype not in gates:  # rounded first, as `multiply` does
                        gates[dtype] = torch.stack([gate[0].to(dtype).float(), gate[1]])
                    seen.append((parameter, group, float(self.state[parameter]["step"])))
        self._counted = [parameter for parameter, _, _ in seen]
        keys = self._step_keys({parameter: t for parameter, _, t in seen})
        updates = [self.next_update(parameter, group, t, keys, gates) for parameter, group, t in seen]
        if not updates:
            return
        amaxes = self._over_ranks(self.backend.amaxes(updates)) if any(u.per_tensor for u in updates) else None
        self.backend.update(updates, amaxes)

    @torch.no_grad()
    def uncount(self) -> None:
        """The last update was left out: the next one has its number."""
        for parameter in self._counted:
            self.state[parameter]["step"] -= 1
        self._counted = []

    def next_update(
        self,
        parameter: Tensor,
        group: dict[str, Any],
        t: float,
        keys: dict[tuple[Tensor, int], Tensor],
        gates: Mapping[torch.dtype, Tensor] = MappingProxyType({}),
    ) -> Update:
        """Update ``t`` of a parameter, with its noise of ``keys`` and its gate by the dtype of its gradient.

        Nothing is done yet.
        """
        place = self.places[parameter]
        assert parameter.grad is not None
        # A checkpoint loads in place, and FSDP reuses its shards: the views of __init__ still hold.
        weight = local(parameter).view(place.rows, place.cols)
        w_parts = place.parts[2] if place.has_master else place.parts[2] | {"": weight}
        m, v, w = (
            Encoded(codec=codec, parts=parts, key=keys.get((parameter, which)))
            for which, (codec, parts) in enumerate(
                zip(place.codecs, (place.parts[0], place.parts[1], w_parts), strict=True)
            )
        )
        return Update(
            grad=local(parameter.grad).reshape(place.rows, place.cols).contiguous(),
            m=m,
            v=v,
            w=w,
            weight=weight if place.has_master else None,
            row_offset=place.row_offset,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            decay=group["weight_decay"],
            t=t,
            gate=gates.get(parameter.grad.dtype),
        )

    def _step_keys(self, times: dict[Tensor, float]) -> dict[tuple[Tensor, int], Tensor]:
        if self._keys is None:
            return {}
        device, numbers = self._keys.device, [int(times.get(parameter, 0)) for parameter, _ in self._keyed]
        if len(set(numbers)) == 1:
            t = torch.full((1, 1), numbers[0], dtype=torch.int64, device=device)  # filled there: nothing waits
        else:  # something had no gradient
            t = torch.tensor(numbers, dtype=torch.int64)[:, None]
            t = t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)
        return dict(zip(self._keyed, step_key(self._keys, t).unbind(), strict=True))

    def _over_ranks(self, amaxes: Tensor) -> Tensor:
        """Their maxima over all ranks; NaN as an infinity, since a maximum over ranks may lose a NaN."""
        amaxes = torch.where(amaxes.isnan(), torch.inf, amaxes)
        one = next(iter(self.places))
        if isinstance(one, DTensor):  # all of them on one mesh; replicas hold the same
            for dim, placement in enumerate(one.placements):
                if isinstance(placement, Shard) and one.device_mesh.size(dim) > 1:
                    dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=one.device_mesh.get_group(dim))
        return amaxes


ORDER: tuple[AdamBackend, ...] = (CpuAdam(), TritonAdam(), REFERENCE)


@dataclass(frozen=True, slots=True)
class UpdateChoice:
    """The backend of updates, and why those before it refused."""

    backend: AdamBackend
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.backend.name}{''.join(f' ({reason})' for reason in self.refused)}"


def choose_update(
    device: torch.device, wanted: str = "auto", *, codecs: Collection[Codec] = (), beta1: float = 0.9
) -> UpdateChoice:
    """The backend of updates on ``device``: the one of that name if it can, else the first that can.

    A name that only matrix products know means nothing here.
    """
    reasons = {backend.name: backend.why_not(device, codecs, beta1) for backend in ORDER}
    if wanted in reasons and reasons[wanted] is None:
        return UpdateChoice(next(backend for backend in ORDER if backend.name == wanted))
    first = next(index for index, backend in enumerate(ORDER) if reasons[backend.name] is None)
    asked = {wanted, *(backend.name for backend in ORDER[:first])}
    refused = {name: reason for name, reason in reasons.items() if name in asked and reason is not None}
    obvious = f"the parameters are on {device.type}"  # unless it was asked for by name
    said = [f"not {name}: {reason}" for name, reason in refused.items() if name == wanted or reason != obvious]
    return UpdateChoice(ORDER[first], tuple(said))


def can_gate(optimizer: Optimizer) -> bool:
    """Whether ``gated_step`` knows this optimizer."""
    return _is_fused(optimizer) or isinstance(optimizer, CodecAdamW)


def _is_fused(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.AdamW) and bool(optimizer.defaults["fused"])


def gated_step(optimizer: Optimizer, applied: Tensor, factor: Tensor | None) -> Callable[[], None]:
    """``optimizer.step()`` if ``applied``, and else nothing: the device decides, and nobody waits for it.

    Args:
        applied: bool scalar on the parameters' device. Where it is false, parameters, moments and counters stay as
            they were, to the bit.
        factor: FP32 scalar, of all gradients; None: 1. ``multiply`` says how they are multiplied.

    Returns what must be called, before the next step and before a counter is read, once it is known that the update was
    left out. Raises ValueError where ``can_gate`` is false.
    """
    if isinstance(optimizer, CodecAdamW):
        one = torch.ones((), dtype=torch.float32, device=applied.device)
        optimizer.step(gate=torch.stack([one if factor is None else factor, applied.float()]))
        return optimizer.uncount
    if not can_gate(optimizer):
        raise ValueError(f"{type(optimizer).__name__} cannot be told on the device to leave an update out")
    there: Any = optimizer  # as torch.amp.GradScaler tells it
    there.found_inf = (~applied).float()
    there.grad_scale = None if factor is None else 1.0 / factor
    try:
        optimizer.step()
    finally:
        del there.found_inf, there.grad_scale
    return lambda: None


@torch.no_grad()
def multiply(optimizer: Optimizer, gradients: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply gradients in place, to the bit as ``gated_step`` takes them: by ``factor`` rounded to their dtype, but
    for torch's fused AdamW, which divides by its inverse.
    """
    alike: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        alike.setdefault(gradient.dtype, []).append(gradient)
    for dtype, tensors in alike.items():
        if _is_fused(optimizer):
            torch._foreach_div_(tensors, 1.0 / factor)
        else:
            torch._foreach_mul_(tensors, factor.to(dtype))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _nearest(codec: Codec) -> Codec:
    return replace(codec, rounding=Rounding.NEAREST) if isinstance(codec, (Plain, Scaled)) else codec


def _sharded_as(part: Tensor, parameter: Tensor) -> Tensor:
    """``part``, whose rows are this rank's rows of ``parameter``, as a tensor of all ranks."""
    if not isinstance(parameter, DTensor):
        return part
    shape = torch.Size((parameter.shape[0], *part.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def _row_offset(parameter: Tensor) -> int:
    """The first row of this rank's part in the full parameter."""
    if not isinstance(parameter, DTensor):
        return 0
    offset = 0
    for dim, placement in enumerate(parameter.placements):
        assert isinstance(placement, (Shard, Replicate)), "gradients must be complete before an update"
        if isinstance(placement, Shard):
            assert placement.dim == 0, "states follow parameters sharded by rows"
            rows, ranks = parameter.shape[0], parameter.device_mesh.size(dim)
            offset = min(rows, parameter.device_mesh.get_local_rank(dim) * -(-rows // ranks))
    return offset
