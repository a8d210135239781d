"""The training loop. ``train`` is the run from first step to last, ``step.update_from`` is the step; nothing is hidden.

No callbacks, no autocast, no global configuration: a ``Training`` is a value, built in ``run.py``.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import torch

from ..precision.probe import Probe, check_settings
from .checkpointer import Checkpointer
from .console import Console, megabytes
from .data.batches import DataSource
from .distributed import World
from .errors import ExitCode, as_user_error, require_at_least
from .metrics import MetricsFile
from .optim import OptimConfig
from .sharpness import sharpness
from .spikes import Spike, SpikeAction
from .state import TrainState, evaluating
from .step import StepResult, due, losses_of, update_from
from .stop import StopRequest, seconds_of
from .trackers import Trackers


@dataclass(kw_only=True)
class LoopConfig:
    """How long a run is, and when it gives up."""

    steps: int
    micro_batch_size: Any = "auto"  # sequences a process computes at once; auto: the largest that fits
    max_nonfinite_in_a_row: int = 10  # skipped steps before the run ends as diverged
    stop_after: str | None = None  # HH:MM:SS since the launcher began: then a checkpoint, and exit code 75
    spike: SpikeAction = SpikeAction.off  # what is done about a step whose loss or gradient norm is far above the last
    spike_window: int = 128  # applied steps that the mean and the deviation are of
    spike_deviations: float = 6.0  # above the mean, in standard deviations, from which it is a spike
    spike_limit: int = 10  # spikes that are dealt with; at the next one the run ends as diverged

    def validate(self) -> None:
        """Raises ValueError for a number out of range, and UserError for what is no time."""
        require_at_least("train", self, steps=1, max_nonfinite_in_a_row=1, spike_window=2, spike_limit=1)
        if not 0 < self.spike_deviations < math.inf:
            raise ValueError(f"train.spike_deviations={self.spike_deviations}: must be positive and finite")
        if self.stop_after is not None:
            with as_user_error(f"train.stop_after={self.stop_after}: ", ValueError):
                seconds_of(self.stop_after)
        size = self.micro_batch_size
        if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"train.micro_batch_size={size}: must be 'auto' or a whole number from 1")


class EvalPrecision(Enum):
    """What matrix products of a validation are computed in."""

    recipe = "recipe"  # as in training
    high = "high"  # the recipe's compute dtype, nothing quantized


@dataclass(kw_only=True)
class EvalConfig:
    """Validation, always on the same first tokens of the split."""

    every: int = 100  # steps; 0 = only at the end
    tokens: int = 200_000  # rounded up to full sequences; 0 = no validation at all
    precision: EvalPrecision = EvalPrecision.recipe
    sharpness: int = 32  # sequences whose last logits' sharpness is measured with it; 0 = not

    def validate(self) -> None:
        """Raises ValueError for negative counts."""
        require_at_least("eval", self, every=0, tokens=0, sharpness=0)


@dataclass(kw_only=True)
class ProbeConfig:
    """What rounding does to every operand and product, measured now and then; it changes nothing."""

    every: int = 0  # steps; 0 = never
    layers: str | None = None  # regex of the linears, full match; null = all

    def validate(self) -> None:
        """Raises UserError for a negative count, and for what is no regular expression."""
        with as_user_error("probe.", ValueError):
            check_settings(self.every, self.layers)


class Status(Enum):
    """How a run ended; the value stands in ``done.json``."""

    finished = "finished"
    stopped = "stopped"
    diverged = "diverged"
    failed = "failed"

    @property
    def exit_code(self) -> ExitCode:
        return ExitCode[self.name.upper()]


@dataclass(frozen=True)
class Outcome:
    status: Status
    step: int
    reason: str


@dataclass
class Training:
    """All that a run consists of."""

    world: World
    state: TrainState
    source: DataSource
    validation: DataSource | None
    validation_bytes: float  # of the text that the validation targets spell
    micro_batch: int  # sequences
    tokens_per_step: int
    config: LoopConfig
    eval_config: EvalConfig
    optim_config: OptimConfig
    checkpointer: Checkpointer
    stop: StopRequest
    metrics: MetricsFile | None = None  # on rank 0
    console: Console | None = None
    trackers: Trackers | None = None
    probe: Probe | None = None
    evaluated_step: int = -1  # the newest validation that metrics.jsonl holds
    last_eval: dict[str, Any] | None = None
    unlogged: Unlogged | None = None  # the last step, while its numbers are still on the device
    logged_at: float = 0.0  # on the clock, when the last step's numbers were there
    overdue: bool = False  # a checkpoint, by the clock, as of the last step

    def log(self, row: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(row)
        if self.trackers is not None:
            self.trackers.log(row)

    def say(self, text: str) -> None:
        if self.console is not None:
            self.console.line(text)


@dataclass(frozen=True)
class Unlogged:
    """A step that is done as far as this process is concerned: number, from 1, and when it began and ended here."""

    step: int
    result: StepResult
    started: float
    ended: float


def train(training: Training) -> Outcome:
    """Train from ``training.state.step`` to the last step, validating and checkpointing on the way.

    Where ``training.world`` defers, a step is logged once the next one is on its way. It is waited for where something
    hangs on it: a validation, a checkpoint, a probe, a stop, the end, and while steps are being skipped, so that a run
    ends as diverged at the step at which it would anyway.
    """
    state, total = training.state, training.config.steps
    training.world.begin_training()
    # A run stopped before or in a validation that was due makes up for it.
    missed = (
        0 < state.step < total and due(training.eval_config.every, state.step) and training.evaluated_step < state.step
    )
    if missed and (stop_code := evaluate(training)):
        return _stopped(training, stop_code)
    while state.step < total:
        started = time.monotonic()
        result, stop_code = train_step(training, state.step)
        state.step += 1
        ended = time.monotonic()
        log_last_step(training)
        training.unlogged = Unlogged(state.step, result, started, ended)
        evaluation = due(training.eval_config.every, state.step) or state.step == total
        careful = state.nonfinite_in_a_row > 0 or training.config.max_nonfinite_in_a_row == 1
        known = not training.world.deferred or result.loss_scale is not None or state.spikes is not None
        save = training.overdue or due(training.checkpointer.config.every, state.step)
        if known or stop_code or evaluation or careful or save:
            log_last_step(training)

        if state.nonfinite_in_a_row >= training.config.max_nonfinite_in_a_row:
            return Outcome(
                Status.diverged,
                state.step,
                f"{state.nonfinite_in_a_row} steps in a row with a non-finite loss or gradient",
            )
        if result.spike is not None:
            done = state.step
            if outcome := _after_spike(training, result, result.spike):
                return outcome
            if state.step < done:  # rolled back
                if stop_code:
                    return _stopped(training, stop_code)
                continue
        if not stop_code and due(training.eval_config.every, state.step) and state.step < total:
            stop_code = evaluate(training)
        # In the middle of skipped steps the weights may be past saving: such a checkpoint replaces no other.
        sound = state.nonfinite_in_a_row == 0
        if stop_code:
            training.checkpointer.save(state, prune=sound)
            return _stopped(training, stop_code)
        if state.step == total or (sound and save):
            training.checkpointer.save(state, prune=sound)
        if training.checkpointer.given_up:
            reason = f"{training.checkpointer.failures} checkpoints in a row failed: {training.checkpointer.last_error}"
            return Outcome(Status.failed, state.step, reason)

    if stop_code := evaluate(training):
        return _stopped(training, stop_code)
    training.checkpointer.wait()
    if state.nonfinite_in_a_row:
        reason = f"the run ends with {state.nonfinite_in_a_row} skipped steps: non-finite loss or gradient"
        return Outcome(Status.diverged, state.step, reason)
    if training.checkpointer.saved_step != state.step:
        return Outcome(
            Status.failed, state.step, training.checkpointer.last_error or "the last checkpoint was not written"
        )
    return Outcome(Status.finished, state.step, f"all {total} steps done")


def log_last_step(training: Training) -> None:
    """Wait for the numbers of the last step, if that is not done yet: count it and log it."""
    if training.unlogged is None:
        return
    last, training.unlogged = training.unlogged, None
    if last.result.finite:
        training.state.nonfinite_in_a_row = 0
    elif not last.result.caught:
        training.state.nonfinite_in_a_row += 1
    # Steps that overlap took the time since the numbers of the one before were there, or what this process took.
    before, training.logged_at = training.logged_at, time.monotonic()
    seconds = max(training.logged_at - max(last.started, before), last.ended - last.started)
    _log_step(training, last.step, last.result, seconds)
    tell_checkpoints(training)


def tell_checkpoints(training: Training) -> None:
    """Say which checkpoints have been written since the last time."""
    while not training.checkpointer.written.empty():
        step, size, seconds = training.checkpointer.written.get()
        training.say(f"checkpoint of step {step} written: {megabytes(size)} in {seconds:.1f} s")


def _after_spike(training: Training, result: StepResult, spike: Spike) -> Outcome | None:
    """Write down that the last step was a spike, and go back if so configured. The end of the run, if it ends here."""
    state, config, step = training.state, training.config, training.state.step
    assert state.spikes is not None
    assert state.left_out is not None
    ends = int(state.spikes.count) >= config.spike_limit
    row: dict[str, Any] = {
        "kind": "spike",
        "step": step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "deviations": spike.deviations,
        "action": "end" if ends else "skip",
        "samples": _samples(training, step - 1, step),
        "back_to": None,
        "time": time.time(),
    }
    if not ends:
        state.spikes.count += 1
    if config.spike is SpikeAction.rollback and not ends:
        # Not the newest there is: a run that was stopped on the way has others than one that was left alone.
        every = training.checkpointer.config.every
        target = (step - 1) // every * every
        samples = _samples(training, target, step)
        reason = training.checkpointer.roll_back(state, target)
        if reason is None:
            state.left_out += step - target
            state.plan.resume(target, config.steps)
            row |= {"action": "rollback", "samples": samples, "back_to": target}
            training.say(f"back to step {target}: samples {samples[0]} to {samples[1]} of the run are left out")
        else:
            training.say(
                f"warning: not back to step {target}: {reason}; the run goes on without the update of step {step}"
            )
    training.log(row)
    if not ends:
        return None
    reason = f"more than train.spike_limit={config.spike_limit} spikes: at step {step} {spike}"
    return Outcome(Status.diverged, step, reason)


def train_step(training: Training, step: int) -> tuple[StepResult, int]:
    """Step ``step`` (from 0), and the code of a stop that some rank was asked for (0 = none)."""
    watched = training.probe is not None and training.probe.due(step + 1)
    if watched:
        log_last_step(training)  # its rows come after those of the step before
    with training.probe.watching() if training.probe is not None and watched else nullcontext():
        result = update_from(
            training.state, training.source, training.world, training.optim_config, step, training.config.steps
        )
    if training.probe is not None and watched:
        _log_probe(training, training.probe, step + 1)
    overdue = training.world.is_main and training.checkpointer.overdue  # one clock decides for all
    stop_code, training.overdue = training.world.max(training.stop.code, overdue)
    return result, int(stop_code)


def evaluate(training: Training) -> int:
    """Validate and log; the same tokens in the same order at every world size.

    Returns 0, or, if a rank was asked to stop meanwhile, that code: nothing is logged then.
    """
    if training.validation is None:
        return 0
    config = training.eval_config
    training.world.watch.at(f"the validation at step {training.state.step}")
    result = validate(training.state, training.validation, training.world, training.stop, config.precision)
    if isinstance(result, int):
        return result
    loss_sum, weight_sum = result
    loss = loss_sum / weight_sum
    row = {
        "kind": "eval",
        "step": training.state.step,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss_sum / math.log(2) / training.validation_bytes,
        "tokens": int(weight_sum),
        "time": time.time(),
    }
    if config.sharpness:
        with _products(training.state, config.precision):
            row["sharpness"] = sharpness(training.state, training.validation, training.world, config.sharpness)
    training.last_eval = row
    training.log(row)
    training.say(
        f"validation at step {row['step']}: loss {loss:.4f}, perplexity {row['perplexity']:.2f}, "
        f"{row['bits_per_byte']:.4f} bits per byte"
    )
    return 0


def validate(
    state: TrainState, source: DataSource, world: World, stop: StopRequest, precision: EvalPrecision
) -> tuple[float, float] | int:
    """Summed loss in nats and summed weight over one pass of ``source``, over all ranks.

    If a rank is asked to stop meanwhile, that code instead.
    """
    # Added up on the device: nothing waits for it between micro-batches.
    there, weight_sum = torch.zeros((), dtype=torch.float64, device=world.device), 0.0
    with evaluating(state.model), _products(state, precision):
        for micro in range(source.num_micro):
            batch = source.batch(0, micro)
            losses_BT = losses_of(state.model, batch, world.device)
            there += (losses_BT * batch.weights.to(world.device)).sum(dtype=torch.float64)
            weight_sum += float(batch.weights.sum())
            (stop_code,) = world.max(stop.code)
            if stop_code:
                return int(stop_code)
    loss_sum, weight_sum = world.sum(float(there), weight_sum)
    return loss_sum, weight_sum


def _products(state: TrainState, precision: EvalPrecision) -> AbstractContextManager[None]:
    return state.plan.high_precision() if precision is EvalPrecision.high else nullcontext()


def _log_step(training: Training, step: int, result: StepResult, seconds: float) -> None:
    row: dict[str, Any] = {
        "kind": "train",
        "step": step,
        "tokens": step * training.tokens_per_step,
        "loss": result.loss,
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        "tokens_per_second": training.tokens_per_step / seconds,
        "time": time.time(),
    }
    row |= {f"aux.{name}": value for name, value in result.aux.items()} | result.telemetry
    if result.loss_scale is not None:
        row["loss_scale"] = result.loss_scale
    if not result.applied:
        row["samples"] = first, last = _samples(training, step - 1, step)
        row["skipped"] = f"loss {result.loss}, grad norm {result.grad_norm}"
        reason = f"loss {result.loss}, gradient norm {result.grad_norm}"
        if result.spike is not None:
            row["skipped"] = reason = f"spike: {result.spike}"
        if result.caught:
            row["skipped"] = f"gradient overflow at loss scale {result.loss_scale:g}"
            reason = f"{row['skipped']}, now {training.state.plan.loss_scale:g}"
        training.say(
            f"{'' if result.caught else 'warning: '}step {step} skipped on all ranks: {reason}; "
            f"its batch is samples {first} to {last} of the run"
        )
    training.log(row)
    if training.console is not None:
        training.console.train(row, seconds)


def _log_probe(training: Training, probe: Probe, step: int) -> None:
    rows = probe.rows()
    if training.metrics is not None:
        training.metrics.write(*({"kind": "probe", "step": step, **asdict(row)} for row in rows))
    if training.trackers is not None:
        curves = ("sqnr_db", "underflow_percent", "saturation_percent", "relative_error")
        values = {f"{row.module}/{row.slot}/{name}": getattr(row, name) for row in rows for name in curves}
        training.trackers.log({"kind": "probe", "step": step} | values)


def _samples(training: Training, begin: int, end: int) -> list[int]:
    """The first and the last sample, over all ranks, of steps ``begin`` (from 0) to before ``end``; of rank 0 alone."""
    first, after = (training.source.first_sample(training.state.data_step(step)) for step in (begin, end))
    return [first, after - 1]


def _stopped(training: Training, code: int) -> Outcome:
    training.checkpointer.wait()
    reason = f"stopped by {training.stop.describe(code)}"
    if training.checkpointer.saved_step != training.state.step:
        return Outcome(Status.failed, training.state.step, f"{reason}; {training.checkpointer.last_error}")
    return Outcome(Status.stopped, training.state.step, reason)
