"""One optimizer for all update rules: codecs, noise, shards, collectives, and the names of states in checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..noise import base_key, step_key
from ..spec import Rounding
from .choose import UpdateChoice, choose_update
from .codecs import FP32, Codec, Kahan, Parts, Plain, Scaled
from .exchange import exchanged, local, over_ranks, row_offset, sharded_as
from .moments import STANDARD, Moments
from .reference import Encoded, Kind, Update, amaxes_of, asked, given, new_values, store
from .rules import WEIGHTS, UpdateRule, chain, rule_of

_SLOTS = {"m": 16, "v": 17, WEIGHTS: 18}  # of rounding noise: a linear's operands have the lower ones
_BY_NAME, _OF_RULE = 19, 20  # slots of other states, and of a rule's own draws
_GATHERED = 2**25  # elements that are gathered at a time, unless one matrix has more


class OptimizerBuilder(Protocol):
    """What stands in for an update rule and builds an optimizer of its own.

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


def build(rule: UpdateRule | OptimizerBuilder, groups: Iterable[dict[str, Any]], **settings: Any) -> Optimizer:
    """The optimizer of a rule: one that it builds itself, else ``StateOptimizer``. ``settings``: as its ``build``."""
    own: Callable[..., Optimizer] | None = getattr(rule, "build", None)
    if own is not None:
        return own(groups, **settings)
    assert isinstance(rule, UpdateRule), f"{rule} is no update rule, and builds no optimizer"
    return StateOptimizer(groups, rule=rule, **settings)


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A parameter's matrix on this rank and its states, each as [rows, cols]: views, so that writing changes both.

    ``codecs``, ``parts``: of the rule's states in its order, and last of the weights. ``has_master``: whether the
    weights are in a state of their own, ``master``, and not in the parameter.
    """

    name: str
    kind: Kind
    rule_index: int  # in the optimizer's rules
    rows: int
    cols: int
    row_offset: int
    codecs: tuple[Codec, ...]
    parts: tuple[Parts, ...]
    has_master: bool

    def weights(self, weight: Tensor) -> Parts:
        """Those of the weights, of which the parameter ``weight`` [rows, cols] may be one."""
        return self.parts[-1] if self.has_master else self.parts[-1] | {"": weight}


class StateOptimizer(Optimizer):
    """An update rule over states in codecs.

    State of a parameter: ``step``; the parts of the rule's states and, where the weights are not the parameter itself
    or have a residual, of ``master``, as ``exp_avg_codes``, ``exp_avg_scales`` and so on. Parts with rows are DTensors
    sharded as the parameter is. Parameters of one dimension have FP32 states, and FP32 masters where those of matrices
    have scales. Rounding noise is a function of (seed, number of the update, name, state, position in the parameter).

    Args:
        groups: of parameters, named or not; a name is needed where rounding is stochastic, and by some rules.
        rule: and those that follow it by ``rest``.
        moments: the codecs of the states.
        seed: of rounding noise.
        backend: ``auto``, ``cpu``, ``triton`` or ``reference``.

    Raises ValueError for a parameter that no rule takes.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        rule: UpdateRule,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        moments: Moments = STANDARD,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(list(groups), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.rule, self.moments = rule, moments
        self.rules = list(chain(rule))
        self._exchanges = [type(one).exchange is not UpdateRule.exchange for one in self.rules]
        self.places: dict[Tensor, Place] = {}
        keys: list[Tensor] = []
        self._keyed: dict[tuple[Tensor, int], int] = {}  # (parameter, which state, -1 for the rule) -> row of the keys
        for group in self.param_groups:
            names = group.get("param_names", [""] * len(group["params"]))
            for name, parameter in zip(names, group["params"], strict=True):
                place = self._place(name, parameter)
                self.places[parameter] = place
                for which, slot, state in _noises(place):
                    if not name:
                        what = (
                            f"{place.codecs[which]} rounds stochastically"
                            if which >= 0
                            else f"{place.kind.rule.name} draws"
                        )
                        raise ValueError(f"{what}: its noise goes by the parameter's name")
                    self._keyed[parameter, which] = len(keys)
                    keys.append(base_key(seed, f"{name}{state}", slot))
        device = next(iter(self.places)).device
        self._keys = torch.stack(keys).to(device) if keys else None
        self._counted: list[Tensor] = []  # the parameters of the last update
        beta1 = min(float(group["betas"][0]) for group in self.param_groups)
        self.choices: list[UpdateChoice] = []
        for number, one in enumerate(self.rules):
            places = [place for place in self.places.values() if place.rule_index == number]
            codecs = dict.fromkeys(codec for place in places for codec in place.codecs)
            self.choices.append(choose_update(one, device, backend, codecs=codecs, beta1=beta1))
        with torch.no_grad():
            self._encode_masters()

    @property
    def computed_by(self) -> str:
        """Who computes updates, for plan.txt."""
        if len(self.rules) == 1:
            return f"[{self.choices[0]}]"
        return ", ".join(f"{rule.name} [{choice}]" for rule, choice in zip(self.rules, self.choices, strict=True))

    def _place(self, name: str, parameter: Tensor) -> Place:
        weight, shape = local(parameter.detach()), tuple(parameter.shape)
        rule = rule_of(self.rule, name, shape)
        rows = weight.shape[0] if weight.dim() else 1
        cols = math.prod(shape[1:])
        itself: Codec = Plain(dtype=parameter.dtype)
        w = itself if self.moments.master is None else self.moments.master
        has_master = not isinstance(w, (Plain, Kahan))
        if has_master and parameter.dim() < 2:
            w = FP32
        extents = tuple(state.of(shape) for state in rule.states)
        state: dict[str, Tensor] = {"step": torch.zeros((), dtype=torch.float32)}
        codecs, everything = [], []
        for one, extent in zip(rule.states, extents, strict=True):
            if extent.by_rows and extent.shape[:1] != shape[:1]:
                raise ValueError(f"{rule.name}: state {one.name} {extent.shape} of {name} has other rows than {shape}")
            codec = FP32 if parameter.dim() < 2 else self.moments.of(rule, one)
            parts = _zeros(codec, extent.matrix(rows), weight.device)
            for part, stored in parts.items():
                seen = _seen(stored, extent.matrix(rows), extent.local(rows))
                seen = sharded_as(seen, parameter) if stored.dim() and extent.by_rows else seen
                state[f"{one.saved_as}_{part}" if part else one.saved_as] = seen
            codecs.append(codec)
            everything.append(parts)
        parts = _zeros(w, (rows, cols), weight.device, but=() if has_master else ("",))
        for part, stored in parts.items():
            seen = _seen(stored, (rows, cols), tuple(weight.shape))
            state[f"{WEIGHTS}_{part}" if part else WEIGHTS] = sharded_as(seen, parameter) if stored.dim() else seen
        if not has_master:
            held = w.layout(rows, cols)[""][1]
            assert weight.dtype == held, f"{name} is {weight.dtype}, its codec has {held}"
        self.state[parameter] = state
        return Place(
            name, Kind(rule=rule, extents=extents, shape=shape), self.rules.index(rule), rows, cols,
            row_offset(parameter), (*codecs, w), (*everything, parts), has_master,
        )  # fmt: skip

    def _encode_masters(self) -> None:
        """Masters start at the parameters: rounded to nearest, whatever updates do."""
        chosen = [(p, place) for p, place in self.places.items() if place.has_master]
        if not chosen:
            return
        weights = [local(parameter).view(place.rows, place.cols).float() for parameter, place in chosen]
        zero = weights[0].new_zeros(())
        tops = torch.stack([weight.abs().amax() if weight.numel() else zero for weight in weights])
        for (parameter, place), weight, top in zip(chosen, weights, over_ranks(tops, chosen[0][0]), strict=True):
            codec = place.codecs[-1]
            for name, part in _nearest(codec).encode(weight, amax=top if codec.per_tensor else None).items():
                place.parts[-1][name].copy_(part)
            local(parameter).view(place.rows, place.cols).copy_(codec.decode(place.parts[-1]))

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, gate: Tensor | None = None
    ) -> None:
        """One update of every parameter that has a gradient.

        ``gate`` FP32 [2], on the device: what gradients are multiplied by, and 1, or 0 for an update that changes
        nothing but its number: whoever learns that it was left out calls ``uncount`` before the next one.
        """
        assert closure is None
        seen = []
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
        batches: list[list[Update]] = [[] for _ in self.rules]
        owners: list[list[Tensor]] = [[] for _ in self.rules]
        for parameter, group, t in seen:
            number = self.places[parameter].rule_index
            batches[number].append(self.next_update(parameter, group, t, keys, gates))
            owners[number].append(parameter)
        self._compute([pair for pair in enumerate(batches) if pair[1] and not self._exchanges[pair[0]]])
        for number, exchanges in enumerate(self._exchanges):
            if exchanges:
                for chunk in _chunks(owners[number]):
                    self._compute_with_others(batches[number][chunk], owners[number][chunk])

    def _compute(self, batches: list[tuple[int, list[Update]]]) -> None:
        """The updates of rules that need nothing of other ranks but amaxes: of all of them in one collective."""
        backends = [self.choices[number].backend for number, _ in batches]
        found = [
            backend.amaxes(updates) if any(u.per_tensor for u in updates) else None
            for backend, (_, updates) in zip(backends, batches, strict=True)
        ]
        if some := [amaxes for amaxes in found if amaxes is not None]:
            tops = self._over_ranks(torch.cat([one.flatten() for one in some]))
            parts = iter(torch.split_with_sizes(tops, [one.numel() for one in some]))
            found = [None if amaxes is None else next(parts).view(amaxes.shape) for amaxes in found]
        for backend, (_, updates), amaxes in zip(backends, batches, found, strict=True):
            backend.update(updates, amaxes)

    def _compute_with_others(self, updates: list[Update], owners: list[Tensor]) -> None:
        """The updates of a rule whose ranks exchange something: in plain torch, each computed once."""
        updates = _after_exchange(updates, owners)
        values = [new_values(u) for u in updates]
        shape = len(updates), len(updates[0].states)
        amaxes = torch.zeros(shape, dtype=torch.float32, device=updates[0].grad.device)
        if any(u.per_tensor for u in updates):
            for u, value, row in zip(updates, values, amaxes, strict=True):
                amaxes_of(u, value, row)
            amaxes = self._over_ranks(amaxes)
        for u, value, row in zip(updates, values, amaxes, strict=True):
            store(u, value, row)

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
        keys: Mapping[tuple[Tensor, int], Tensor],
        gates: Mapping[torch.dtype, Tensor] = MappingProxyType({}),
    ) -> Update:
        """Update ``t`` of a parameter, with its noise of ``keys`` and its gate by the dtype of its gradient.

        Nothing is done yet.
        """
        place = self.places[parameter]
        assert parameter.grad is not None
        # A checkpoint loads in place, and FSDP reuses its shards: the views of __init__ still hold.
        weight = local(parameter).view(place.rows, place.cols)
        extents, last = place.kind.extents, len(place.parts) - 1
        states = [
            Encoded(
                codec=place.codecs[which],
                parts=place.parts[which] if which < last else place.weights(weight),
                key=keys.get((parameter, which)) if keys else None,
                shared=which < last and not extents[which].by_rows,
            )
            for which in range(last + 1)
        ]
        return Update(
            kind=place.kind,
            grad=local(parameter.grad).reshape(place.rows, place.cols).contiguous(),
            states=tuple(states),
            weight=weight if place.has_master else None,
            row_offset=place.row_offset,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            decay=group["weight_decay"],
            t=t,
            gate=gates.get(parameter.grad.dtype),
            key=keys.get((parameter, -1)) if keys else None,
        )

    def intended(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The update that the next step computes, before any weight is rounded: of the parameter's shape here.

        All ranks must ask alike.
        """
        t = float(self.state[parameter]["step"]) + 1
        update = self.next_update(parameter, group, t, self._step_keys({parameter: t}))
        if self._exchanges[self.places[parameter].rule_index]:
            (update,) = _after_exchange([update], [parameter])
        return update.kind.rule.intended(*given(update))

    def stored_weight(self, parameter: Tensor) -> Tensor:
        """A copy of the stored weights, FP32: of two terms the high one; the master weights where there are any."""
        place = self.places[parameter]
        if place.has_master:
            return place.codecs[-1].decode(place.parts[-1]).clone().view(local(parameter).shape)
        return local(parameter.detach()).float().clone()

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
        return over_ranks(amaxes, next(iter(self.places)))


def _after_exchange(updates: list[Update], owners: list[Tensor]) -> list[Update]:
    """With what their rules asked for, of all of them together."""
    wanted = [asked(u) for u in updates]
    some = [index for index, one in enumerate(wanted) if one is not None]
    received = exchanged([one for one in wanted if one is not None], [owners[index] for index in some])
    updates = list(updates)
    for index, value in zip(some, received, strict=True):
        updates[index] = replace(updates[index], exchanged=value)
    return updates


def _chunks(owners: list[Tensor]) -> Iterator[slice]:
    """Runs of parameters whose gathered matrices are held at a time. The same on all ranks."""
    start, held = 0, 0
    for index, owner in enumerate(owners):
        size = owner.numel()  # of all ranks: they must cut alike
        if index > start and held + size > _GATHERED:
            yield slice(start, index)
            start, held = index, 0
        held += size
    if owners:
        yield slice(start, len(owners))


def _zeros(codec: Codec, matrix: tuple[int, int], device: torch.device, but: Collection[str] = ()) -> Parts:
    return {
        part: torch.zeros(shape, dtype=dtype, device=device)
        for part, (shape, dtype) in codec.layout(*matrix).items()
        if part not in but
    }


def _seen(stored: Tensor, matrix: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """A part as a checkpoint has it: one with an element each in the state's own shape."""
    return stored.view(shape) if stored.shape == matrix else stored


def _noises(place: Place) -> Iterator[tuple[int, int, str]]:
    """Of what needs noise: which state (-1: the rule itself), its slot, and what is added to the parameter's name."""
    names = [*(state.name for state in place.kind.rule.states), WEIGHTS]
    for which, (name, codec) in enumerate(zip(names, place.codecs, strict=True)):
        if codec.stochastic:
            yield which, _SLOTS.get(name, _BY_NAME), "" if name in _SLOTS else f":{name}"
    if place.kind.rule.noisy:
        yield -1, _OF_RULE, ""


def _nearest(codec: Codec) -> Codec:
    return replace(codec, rounding=Rounding.NEAREST) if isinstance(codec, (Plain, Scaled)) else codec
