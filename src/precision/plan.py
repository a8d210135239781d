"""What a recipe became in a model, and its door for a training loop."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from .amax import UNKNOWN
from .context import StepContext
from .coverage import Coverage
from .loss_scale import LossScaler
from .module import PlanRow, quantized_modules
from .parameters import Multipliers, Setting, described, groups, settings
from .recipe import Recipe
from .spec import GEMMS

_CALLS = ("begin_step", "begin_micro", "loss_terms", "before_update", "after_update")
_WORDS = {
    "loss_terms": "a term of the loss",
    "before_update": "may change gradients",
    "after_update": "may change weights",
}


@dataclass
class Plan:
    """What ``apply`` did to a model, and the recipe's door for the training loop."""

    recipe: Recipe
    model: nn.Module
    rows: Sequence[PlanRow]
    update_note: str = ""  # how optimizer states are stored and updated, once that is known
    coverage: Coverage = field(default_factory=Coverage)
    notes: Sequence[str] = ()  # what a user may want to know of how the recipe's arguments were taken
    context: StepContext = field(default_factory=StepContext)
    of_model: frozenset[str] = frozenset()  # persistent buffers that the model had before the recipe came
    comm_notes: Sequence[str] | None = None  # what ranks send each other; None: a trainer does as the recipe says
    settings: dict[str, Setting] = field(init=False)  # what the recipe says of single parameters, by name
    _drawn: bool = field(default=False, init=False)  # initial values, by a training loop that asked for them
    _grouped: bool = field(default=False, init=False)
    _step: int = field(default=0, init=False)
    _scale: Tensor = field(init=False)
    _clean_steps: Tensor = field(init=False)
    _calls: dict[str, list[Callable[..., Any]]] = field(init=False, repr=False)  # of hooks, by method
    _end_steps: list[tuple[Callable[..., None], bool]] = field(init=False, repr=False)  # and whether it takes the loss

    def __post_init__(self) -> None:
        """Raises ValueError for hooks whose tensors have one name, or are the model's, and for what the recipe says of
        parameters that are not there."""
        self._scale, self._clean_steps = (self.recipe.loss_scale or LossScaler()).start()
        hooks = self.recipe.hooks
        for hook in hooks:
            if hasattr(hook, "prepare"):
                hook.prepare(self.model)
        self._calls = {name: [getattr(hook, name) for hook in hooks if hasattr(hook, name)] for name in _CALLS}
        ends = [hook.end_step for hook in hooks if hasattr(hook, "end_step")]
        self._end_steps = [(end, "loss" in inspect.signature(end).parameters) for end in ends]
        owners = [type(hook).__name__ for hook in hooks if _tensors(hook, "parameters") or _tensors(hook, "buffers")]
        if several := [name for name in owners if owners.count(name) > 1]:
            raise ValueError(f"several hooks called {several[0]} have tensors: a checkpoint could not tell them apart")
        if own := {id(parameter): name for name, parameter in self.hook_parameters().items()}:
            for path, parameter in self.model.named_parameters():
                if id(parameter) in own:
                    raise ValueError(f"{own[id(parameter)]} of a hook is {path} of the model, too: it can be but one")
        shapes = {name: parameter.shape for name, parameter in self.parameters().items()}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        everywhere = self.model.named_parameters(remove_duplicate=False)
        tied = {name: names[id(parameter)] for name, parameter in everywhere if name not in shapes}
        self.settings = settings(self.recipe.parameters, shapes, tied)
        if drawn := [name for name, said in self.settings.items() if name.startswith("recipe.") and said.init]:
            raise ValueError(f"parameters: {drawn[0]} is a hook's, which starts it itself")

    @property
    def loss_scale(self) -> float | None:
        """What the loss is multiplied by before backward, and gradients are to be divided by; None without scaling."""
        return None if self.recipe.loss_scale is None else float(self._scale)

    @property
    def can_back_off(self) -> bool:
        """Whether the loss scale can still go down: an overflow is then its business, and no sign of divergence."""
        scaler = self.recipe.loss_scale
        return scaler is not None and bool(self._scale > torch.tensor(scaler.floor, dtype=torch.float32))

    def begin_step(self, step: int, sample_offset: int, total_steps: int | None = None) -> None:
        """Before the first micro-batch of ``step``; ``sample_offset`` is its first sample on this rank, globally."""
        self._step = step
        self.context.set(step, sample_offset, None)
        self.context.begin()
        if self.recipe.schedule:
            picks = [0, 0, 0]
            for number, phase in enumerate(self.recipe.schedule, 1):
                if phase.span is not None and step in phase.span.steps(total_steps):
                    picks = [number if gemm in phase.gemms else pick for gemm, pick in zip(GEMMS, picks, strict=True)]
            for _, module in quantized_modules(self.model):
                module.use((picks[0], picks[1], picks[2]))
        for begin_step in self._calls["begin_step"]:
            begin_step(self.model, step, total_steps)

    def begin_micro(self, sample_offset: int, samples: int | None = None) -> None:
        """Before every micro-batch of ``samples`` samples: rounding noise goes by the global index of a sample."""
        self.context.set(self._step, sample_offset, samples)
        self.context.begin()
        for begin_micro in self._calls["begin_micro"]:
            begin_micro(self.model)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within, passes count alone and are made again: hooks hear of no micro-batch, amax histories forget them."""
        calls, self._calls = self._calls, self._calls | {"begin_micro": []}
        try:
            yield
        finally:
            self._calls = calls
            for _, module in quantized_modules(self.model):
                if module.delayed is not None:
                    module.amax_history[0].zero_()

    def wants(self, method: str) -> bool:
        """Whether a hook has this method of ``Hook``."""
        return bool(self._calls[method])

    @property
    def wants_loss(self) -> bool:
        """Whether a hook wants the loss of a step."""
        return any(takes_loss for _, takes_loss in self._end_steps)

    def loss_terms(self) -> Tensor:
        """What hooks that want to add to the loss of a micro-batch, after its forward pass: a scalar with a graph."""
        return torch.stack([loss_terms(self.model) for loss_terms in self._calls["loss_terms"]]).sum()

    @torch.no_grad()
    def before_update(self, gradients: Mapping[str, Tensor]) -> None:
        """After the last backward pass, before the gradient's norm is taken (``Hook.before_update``)."""
        for before_update in self._calls["before_update"]:
            before_update(self.model, gradients)

    @torch.no_grad()
    def after_update(self, parameters: Mapping[str, Tensor]) -> None:
        """After an update that was applied (``Hook.after_update``)."""
        for after_update in self._calls["after_update"]:
            after_update(self.model, parameters)

    def end_step(
        self, *, applied: bool | Tensor = True, overflow: bool | Tensor = False, loss: Tensor | None = None
    ) -> None:
        """After the last backward pass.

        ``applied``: whether its gradients are used, or the step is skipped. ``overflow``: it is skipped because its
        gradients, though not its loss, are not finite. (A step without a finite loss says nothing about the scale.)
        Both may be bool scalars on the model's device, which are read only where the loss is scaled. ``loss``: of the
        global batch, on that device, for hooks that want it.
        """
        scaler = self.recipe.loss_scale
        if scaler is not None and (applied or overflow):
            scale, clean_steps = scaler.update(self._scale, self._clean_steps, bool(overflow))
            self._scale.copy_(scale)
            self._clean_steps.copy_(clean_steps)
        if self._end_steps:
            if not isinstance(applied, Tensor):
                device = next((parameter.device for parameter in self.model.parameters()), None)
                applied = torch.full((), applied, dtype=torch.bool, device=device)  # filled there, not copied
            for end_step, takes_loss in self._end_steps:
                end_step(self.model, self._step, applied, **({"loss": loss} if takes_loss else {}))

    def resume(self, steps_done: int, total_steps: int | None) -> None:
        """Stand where the last of ``steps_done`` steps left the recipe: what is evaluated next is computed alike."""
        self.begin_step(max(0, steps_done - 1), 0, total_steps)

    def state_tensors(self) -> dict[str, Tensor]:
        """What the recipe remembers from step to step, by name: persistent buffers of what it put in, the tensors of
        hooks, the loss scale. They are alive, to be written in place.

        Buffers that every rank has for itself appear as one tensor with a first dimension of ranks.
        """
        for _, module in quantized_modules(self.model):
            module.ask_again()
        buffers = self.buffers() | self._hook_tensors("buffers")
        parameters = {name: parameter.detach() for name, parameter in self.hook_parameters().items()}
        scaling = {"loss_scale": self._scale, "loss_scale_clean_steps": self._clean_steps}
        if self._ranks is not None:
            ranks = self._ranks
            buffers = {name: DTensor.from_local(buffer[None], ranks, [Shard(0)]) for name, buffer in buffers.items()}
        return buffers | parameters | (scaling if self.recipe.loss_scale is not None else {})

    def buffers(self) -> dict[str, Tensor]:
        """Persistent buffers of what the recipe put in, by name, alive: this rank's."""
        return {name: buffer for name, buffer in _tensors(self.model, "buffers").items() if name not in self.of_model}

    def model_buffers(self) -> dict[str, Tensor]:
        """The model's own persistent buffers by name, alive: alike on all ranks, whatever the recipe."""
        return {name: buffer for name, buffer in _tensors(self.model, "buffers").items() if name in self.of_model}

    def hook_parameters(self) -> dict[str, Tensor]:
        """Parameters that hooks have of their own, as ``CLASS.NAME``."""
        return self._hook_tensors("parameters")

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by name: the model's, and those of hooks as ``recipe.CLASS.NAME``."""
        of_hooks = {f"recipe.{name}": parameter for name, parameter in self.hook_parameters().items()}
        return dict(self.model.named_parameters()) | of_hooks

    def initial(self, name: str) -> tuple[float, float] | None:
        """Mean and standard deviation by which the recipe has a parameter of the model start; None: it says nothing."""
        self._drawn = True
        return self.settings[name].init

    def parameter_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The parameters that are trained, named, in groups of one learning rate and decay, for an optimizer.

        A model may have a method ``multipliers_of(name, shape)``, factors of both; else what has one dimension does not
        decay. The recipe's settings come first. A schedule multiplies a group's ``lr``, or sets it to its own times
        ``lr_scale``. Parameters of hooks do not decay, and have a group of their own.

        Args:
            lr: the peak.
        """
        self._grouped = True
        of_model: Multipliers = getattr(self.model, "multipliers_of", _multipliers)
        trained = [(name, p) for name, p in self.parameters().items() if p.requires_grad]
        result = []
        for of_hooks in (False, True):
            some = [(name, p) for name, p in trained if name.startswith("recipe.") == of_hooks]
            say = _undecayed if of_hooks else of_model
            result += groups(some, self.settings, lr=lr, weight_decay=weight_decay, of_model=say)
        return result

    def _hook_tensors(self, kind: str) -> dict[str, Tensor]:
        return {
            f"{type(hook).__name__}.{name}": tensor
            for hook in self.recipe.hooks
            for name, tensor in _tensors(hook, kind).items()
        }

    def move_hooks(self, device: torch.device) -> None:
        """Have the tensors of hooks on the model's device."""
        for tensor in (*self.hook_parameters().values(), *self._hook_tensors("buffers").values()):
            tensor.data = tensor.data.to(device)

    @property
    def differs_by_rank(self) -> bool:
        """Whether every rank has buffers of its own."""
        return any(getattr(hook, "differs_by_rank", False) for hook in self.recipe.hooks)

    @functools.cached_property
    def _ranks(self) -> DeviceMesh | None:
        """All ranks, if their buffers differ."""
        if not self.differs_by_rank or not dist.is_initialized() or dist.get_world_size() == 1:
            return None
        device = next(self.model.parameters()).device.type
        return init_device_mesh(device, (dist.get_world_size(),))

    def reset_state(self) -> None:
        """Set every remembered tensor to its start; after ``to_empty`` they hold garbage."""
        for module in self.model.modules():
            if (reset_state := getattr(module, "reset_state", None)) is not None:  # of any module, ours or not
                reset_state()
        self._start_scaling()

    def forget(self) -> None:
        """Declare what is remembered unknown, as after loading weights alone: the next step measures for itself."""
        for _, module in quantized_modules(self.model):
            module.reset_state(UNKNOWN)
        self._start_scaling()

    def _start_scaling(self) -> None:
        if self.recipe.loss_scale is not None:
            for tensor, start in zip((self._scale, self._clean_steps), self.recipe.loss_scale.start(), strict=True):
                tensor.copy_(start)

    @contextmanager
    def high_precision(self) -> Iterator[None]:
        """Run without the recipe's quantization of matrix products."""
        before, self.context.high_precision = self.context.high_precision, True
        try:
            yield
        finally:
            self.context.high_precision = before

    def __str__(self) -> str:
        dtypes = self.recipe.param_dtype, self.recipe.dtypes.compute, self.recipe.dtypes.reduce
        param, compute, reduce = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        head = f"parameters {param}, compute {compute}, gradient reduction {reduce}"
        update = [f"update {self.recipe.update}", f"moments {self.update_note or self.recipe.moments}"]
        scaler = [str(self.recipe.loss_scale)] if self.recipe.loss_scale is not None else []
        phases = [f"schedule: {phase}" for phase in self.recipe.schedule]
        hooks = [f"every step: {_describe(hook)}" for hook in self.recipe.hooks]
        comm = self.recipe.comm.notes if self.comm_notes is None else self.comm_notes
        of_parameters = described(self.settings, drawn=self._drawn, grouped=self._grouped)
        ways = [*of_parameters, *scaler, *phases, *hooks]
        lines = [head, *update, *ways, *map(str, self.rows), *comm, *self.notes, str(self.coverage)]
        return "\n".join(lines) + "\n"


def _multipliers(name: str, shape: torch.Size) -> tuple[float, float]:
    return 1.0, 1.0 if len(shape) > 1 else 0.0


def _undecayed(name: str, shape: torch.Size) -> tuple[float, float]:
    return 1.0, 0.0


def _tensors(owner: Any, kind: str) -> dict[str, Tensor]:
    """The ``parameters``, or the persistent ``buffers``, of a module or a hook, by name."""
    if not isinstance(owner, nn.Module):
        return dict(getattr(owner, kind, dict)())
    if kind == "parameters":
        return dict(owner.named_parameters())
    saved = owner.state_dict().keys()
    return {name: buffer for name, buffer in owner.named_buffers() if name in saved}


def _describe(hook: Any) -> str:
    """A hook's line of plan.txt: its own words, and what it does to the loss, gradients and weights."""
    does = [words for method, words in _WORDS.items() if hasattr(hook, method)]
    does += [f"parameter {name} {list(parameter.shape)}" for name, parameter in _tensors(hook, "parameters").items()]
    return "; ".join([" ".join(str(hook).split()), *does])
