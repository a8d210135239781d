"""Putting a recipe into a model: what its rules choose, what replaces it, and why the rest is left alone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import nn

from .assign import shape_of
from .blocks import LINEARS, Blocks, Experts, find_blocks
from .context import StepContext, require_steps
from .coverage import OUTSIDE, CoverageWarning, covered
from .linear import quantized
from .loading import load
from .module import ModulePhase, PlanRow, QuantizedModule, Site, quantized_modules
from .plan import Plan
from .recipe import NO_ARGUMENTS, Phase, Recipe, Rule, Where
from .spec import LinearSpec
from .suggest import close


def apply(
    recipe: Recipe | str,
    model: nn.Module,
    *,
    args: Mapping[str, Any] = NO_ARGUMENTS,
    paths: str | Sequence[str] = (),
    tokens: int | None = None,
    device: torch.device | None = None,
    backend: str = "auto",
    seed: int = 0,
) -> Plan:
    """Replace modules of ``model`` in place as the recipe's rules say. Works on any tree of ``nn.Linear``.

    Args:
        recipe: what ``load`` gave, or a name, which is loaded with ``args``.
        paths: regex, or several, full match: the linears to quantize, in place of those of the blocks that
            ``precision.blocks`` finds.
        tokens: rows of every activation matrix in one micro-batch, for backends that care about shapes.
        device: where the model will run; the model itself may be on the meta device.
        backend: ``auto``, or the one backend to use.
        seed: of rounding noise.

    Raises ValueError when a rule, or a selector of what it keeps, matches no module: a recipe that silently does
    nothing is worse than none. Also for a model that is quantized already, and for a backend that is none or refuses.
    Warns (``CoverageWarning``) where much of the model is not quantized that nobody chose to leave.
    """
    if isinstance(recipe, str):
        recipe = load(recipe, args)
    elif args:
        raise ValueError("args are those of a recipe given by name; one that is loaded has its own")
    device = device or next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    scene = _Scene.of(model, [paths] if isinstance(paths, str) else list(paths))
    if scene.paths and not any(rule.path is Where.BLOCKS for rule in recipe.rules):
        raise ValueError(
            f"paths={scene.paths}: this recipe chooses no linears of blocks, so there is nothing to choose"
        )
    with _restored_on_error(model):
        plan = _put_in(recipe, scene, tokens, device, backend, seed)
        if plan.coverage.surprises:  # which may be an error by the user's wish
            warnings.warn(str(plan.coverage), CoverageWarning, stacklevel=2)
    _leave_fast_paths(model)
    if why := _by_step(recipe, model):
        require_steps(model, plan.context, why)
    return plan


def _put_in(recipe: Recipe, scene: _Scene, tokens: int | None, device: torch.device, backend: str, seed: int) -> Plan:
    model = scene.model
    of_phases = [_modules_of(phase, scene) for phase in recipe.schedule]
    of_model = frozenset(name for name, _ in model.named_buffers()) & model.state_dict().keys()
    for rule in recipe.rules:
        for path, module in scene.chosen(rule):
            parent = path.rpartition(".")[0]
            siblings = (model.get_submodule(f"{parent}.{name}" if parent else name) for name in rule.siblings)
            replacement = rule.make(module, path, *siblings)
            for place in scene.places(module):  # the same linear at several places stays one
                _set(model, place, replacement)
    for path in dict.fromkeys(path for modules in of_phases for path in modules):
        module = model.get_submodule(path)
        if _is_plain(module):  # in high precision but for a phase
            _set(model, path, quantized(LinearSpec())(module, path))
        elif not isinstance(module, QuantizedModule):
            raise ValueError(f"schedule: {path} is a {type(module).__name__} outside the phases: no step can switch it")
    if recipe.schedule and not any(quantized_modules(model)):
        raise ValueError(f"the schedule ({recipe.schedule[0]}) switches nothing: no linear is quantized")
    context = StepContext(seed=seed, device=None if device.type == "meta" else device)
    rows: list[PlanRow] = []
    for path, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            phases = tuple(
                ModulePhase(phase.when, phase.gemms, modules.get(path))
                for phase, modules in zip(recipe.schedule, of_phases, strict=True)
            )
            module.bind(context, Site(path=path, device=device, tokens=tokens, backend=backend, phases=phases))
            rows += module.plan_rows()
        elif _is_plain(module):
            dtype = str(recipe.dtypes.compute).removeprefix("torch.")
            shape = shape_of(module)
            rows.append(f"{path:44} {shape}  fprop, dgrad, wgrad: {dtype} (torch)")
        elif (row := getattr(module, "plan_row", None)) is not None:
            rows.append(row)
    coverage = replace(covered(model, scene.selected, scene.reasons), scheduled=bool(recipe.schedule))
    notes = tuple(dict.fromkeys(scene.notes))
    plan = Plan(recipe, model, rows, coverage=coverage, notes=notes, context=context, of_model=of_model)
    if device.type != "meta":
        plan.move_hooks(device)
        if not any(parameter.is_meta for parameter in model.parameters()):
            for name, buffer in plan.buffers().items():
                if buffer.is_meta:
                    _set(model, name, torch.empty_like(buffer, device=device))
            plan.reset_state()
    return plan


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear | Experts]:
    """Whether it is what a quantized module of ours can stand for at a step that does not quantize."""
    return type(module) is nn.Linear or isinstance(module, Experts)


def _set(model: nn.Module, path: str, value: nn.Module | torch.Tensor) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, value)


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Give ``model`` the modules back that it had, if what is done within raises."""
    own = ("forward", "plan_row")  # what a rule may put on a module that stays
    before = [
        (module, dict(module._modules), {name: vars(module)[name] for name in own if name in vars(module)})
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, children, attributes in before:
            module._modules.clear()
            module._modules.update(children)
            for name in own:
                vars(module).pop(name, None)
            vars(module).update(attributes)
        raise


def _leave_fast_paths(model: nn.Module) -> None:
    """Have torch's own transformer layers call their linears in evaluation, too, where they would read weights."""
    for module in model.modules():
        if not any(quantized_modules(module)):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_pre_hook(_nothing)  # with a hook there is no fast path
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _nothing(module: nn.Module, inputs: Any) -> None:
    pass


def _by_step(recipe: Recipe, model: nn.Module) -> str:
    """What of a recipe in a model goes by the step, in words; nothing if nothing does."""
    of_modules = dict.fromkeys(module.goes_by_step for _, module in quantized_modules(model))
    reduce = recipe.comm.reduce
    rounded = reduce is not None and reduce.spec.stochastic
    noise = {"rounding noise": None} if rounded else {}
    parts = [*filter(None, of_modules | noise), *["the schedule"] * bool(recipe.schedule)]
    return " and ".join([*parts, *(f"what a step does ({hook})" for hook in recipe.hooks)])


def _modules_of(phase: Phase, scene: _Scene) -> dict[str, QuantizedModule]:
    """What the rules of a phase would make of the modules of a model that is still plain."""
    modules: dict[str, QuantizedModule] = {}
    for rule in phase.rules:
        for path, module in scene.chosen(rule):
            replacement = rule.make(module, path)
            if not isinstance(replacement, QuantizedModule):
                kind = type(replacement).__name__
                raise ValueError(f"schedule: {phase.name} makes a {kind} of {path}: no step can switch that")
            modules.setdefault(path, replacement)
    return modules


@dataclass(frozen=True, slots=True)
class _Scene:
    """A model that rules are applied to, and what they left alone.

    By path: ``selected``, which selector wants a linear in high precision; ``reasons``, why another is not quantized.
    ``notes``: lines of the plan.
    """

    model: nn.Module
    blocks: Blocks
    paths: list[str]  # regexes of the linears to choose, in place of those of the blocks
    unreached: frozenset[str]  # linears whose weights are read by another module, which does not call them
    reasons: dict[str, str]
    selected: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, paths: list[str]) -> _Scene:
        """Raises ValueError for a model that is quantized already or is a single linear, and for a pattern of
        ``paths`` that is none or matches no linear."""
        if isinstance(model, LINEARS):
            raise ValueError(
                "the model is itself a Linear, which has no place to be replaced in: wrap it, as nn.Sequential(linear)"
            )
        linears = {path: module for path, module in model.named_modules() if isinstance(module, LINEARS)}
        for path, module in quantized_modules(model):
            kind = type(module).__name__
            raise ValueError(
                f"the model is quantized already ({path or 'it'} is a {kind}): a recipe goes into a plain model"
            )
        computed = next((path for path, linear in linears.items() if not isinstance(linear.weight, nn.Parameter)), None)
        if computed is not None:
            raise ValueError(f"{computed}: its weight is computed, as by a parametrization: no recipe takes it over")
        for pattern in paths:
            try:
                found = any(re.fullmatch(pattern, path) for path in linears)
            except re.error as error:
                raise ValueError(f"paths={pattern!r}: not a regular expression: {error}") from error
            if not found:
                raise ValueError(f"paths={pattern!r} matches no Linear{close(pattern, linears)}; {_there(linears)}")
        unreached = {
            f"{path}.out_proj" if path else "out_proj"
            for path, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
        }
        reasons = dict.fromkeys(unreached, "read, not called, by nn.MultiheadAttention")
        return cls(model, find_blocks(model), paths, frozenset(unreached), reasons)

    def places(self, module: nn.Module) -> list[str]:
        """All paths of a module, of which the model may hold one object several times."""
        return [path for path, other in self.model.named_modules(remove_duplicate=False) if other is module]

    def chosen(self, rule: Rule) -> list[tuple[str, nn.Module]]:
        """What ``rule`` replaces. Raises ValueError if it, or a part of what it keeps, matches nothing."""
        of_kind = [
            (path, module)
            for path, module in self.model.named_modules()
            if isinstance(module, rule.kinds) and path not in self.unreached
        ]
        matched = [
            (path, module)
            for path, module in of_kind
            if self._matches(rule, path)
            and _has_all(rule.siblings, self.model.get_submodule(path.rpartition(".")[0]))
            and _has_all(rule.children, module)
        ]
        if rule.optional and not matched:
            return []
        kinds = sorted(path for path, _ in of_kind)
        # By name: `transformers` is not imported for an error. Its GPT-2 stores weights the other way round.
        other = sum(type(module).__name__ == "Conv1D" for module in self.model.modules())
        in_blocks = rule.path is Where.BLOCKS
        if not matched or (in_blocks and not self.paths and other and not self.blocks.stacks):
            siblings = f" beside {' and '.join(rule.siblings)}" if rule.siblings else ""
            hint = f"; {other} Conv1D with transposed weights, as in GPT-2 of `transformers`, are not converted"
            near = "" if isinstance(rule.path, Where) else close(rule.path, kinds)
            which = "for the blocks" if in_blocks else repr(rule.path)
            raise ValueError(
                f"the rule {which} matches no {rule.kinds[0].__name__}{siblings}{near}; {_there(kinds)}"
                + (hint if other else "")
            )
        if in_blocks and not self.paths and len(self.blocks.stacks) != 1:
            self.notes.append(str(self.blocks))
        self._check_selectors(rule, matched, of_kind)
        chosen = []
        for path, module in matched:
            selecting = [selector for selector in rule.keep if selector.matches(path, module, self.blocks.of(path))]
            if selecting:
                self.selected.setdefault(path, str(selecting[0]))
            else:
                chosen.append((path, module))
        if not chosen:
            noun = "linears" if nn.Linear in rule.kinds else rule.kinds[0].__name__
            raise ValueError(
                f"all {len(matched)} {noun} in {self.blocks.total} blocks are to be kept in high precision "
                f"({'; '.join(map(str, rule.keep))}): nothing is left for the recipe"
            )
        if in_blocks:
            outside = "not named by paths" if self.paths else OUTSIDE
            for path, _ in of_kind:
                self.reasons.setdefault(path, outside)
        return chosen

    def _check_selectors(
        self, rule: Rule, matched: list[tuple[str, nn.Module]], of_kind: list[tuple[str, nn.Module]]
    ) -> None:
        for selector in rule.keep:
            if any(selector.matches(path, module, self.blocks.of(path)) for path, module in matched):
                continue
            linears = [
                path
                for path, module in self.model.named_modules()
                if selector.names(path, module) and isinstance(module, (*LINEARS, *rule.kinds))
            ]
            if linears:
                self.notes.append(f"to keep in high precision: {selector}: {linears[0]} is in high precision already")
                continue
            kinds = sorted(path for path, _ in of_kind)
            near = close(selector.path, kinds) if selector.path is not None else ""
            raise ValueError(
                f"to keep in high precision: {selector} matches no {rule.kinds[0].__name__}{near}; {_there(kinds)}"
            )

    def _matches(self, rule: Rule, path: str) -> bool:
        if not isinstance(rule.path, Where):
            return re.fullmatch(rule.path, path) is not None
        if self.paths:
            return any(re.fullmatch(pattern, path) for pattern in self.paths)
        return self.blocks.of(path) is not None


def _there(paths: Iterable[str]) -> str:
    found = sorted(paths)
    return f"there are {len(found)}, the first: {', '.join(found[:3]) or 'none'}"


def _has_all(names: Iterable[str], module: nn.Module) -> bool:
    there = dict(module.named_children())
    return all(name in there for name in names)
