"""One run from its config to its ``done.json``: take the directory, build, restore, train, sum up."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..precision.probe import Probe
from . import distributed
from .build import build_state, num_parameters, resolve_model, sequence_bytes
from .checkpoint import Checkpoint, list_checkpoints
from .checkpointer import Checkpointer
from .config import TrainConfig
from .console import Console, ConsoleLog
from .costs import flops_per_token, micro_batch_size, peak_flops, peak_memory, size_in_name
from .data.batches import Ahead
from .data.open import Data, open_data, separate_documents, training_source, validation_source
from .data.stream import TextStream
from .distributed import World, say
from .errors import ExitCode, RunFailed, UserError, as_user_error, one_line, reason_of
from .loop import Outcome, Status, Training, tell_checkpoints, train
from .machine import out_of_memory_line
from .metrics import MetricsFile, evaluated_step
from .model import model_files
from .resume import find_checkpoint, identity
from .rundir import RunDirectory, environment, require_tokenizer
from .spikes import SpikeAction, SpikeWatch
from .stop import StopRequest
from .tools.generate import generate
from .trackers import Trackers


def run(config: TrainConfig) -> ExitCode:
    """Train as ``config`` says, or go on with what ``run.dir`` holds.

    Raises UserError for what the user can mend, RunFailed for what another rank or the machine did.
    """
    directory = RunDirectory(Path(config.run.dir))
    distributed.record_flights(directory.path)
    world = distributed.start(config.parallel)
    try:
        config = world.on_main(lambda: config)  # what other hosts see of a run to go on with may be the past
        with StopRequest(config.train.stop_after) as stop:
            directory.lock(world, stop)
            try:
                with ConsoleLog(directory.path / "console.log") if world.is_main else nullcontext() as log:
                    return _run(config, world, directory, stop, log)
            except (RuntimeError, MemoryError, OSError) as error:
                if distributed.broken_connection(error):
                    raise RunFailed(distributed.explain_broken(error, world, directory.path)) from error
                if (line := out_of_memory_line(error)) is not None:
                    raise RunFailed(_of_rank(world, line)) from error
                raise
            finally:
                directory.unlock()
    finally:
        world.watch.stop()
        distributed.finish()


def _run(
    config: TrainConfig, world: World, directory: RunDirectory, stop: StopRequest, log: ConsoleLog | None
) -> ExitCode:
    world.watch.at("looking for a checkpoint")
    checkpoint = find_checkpoint(config, world, directory)
    if isinstance(checkpoint, Status):
        return ExitCode.FINISHED
    world.watch.at("opening the data")
    own = config.data if checkpoint is None else world.on_main(lambda: directory.data_of(config.data))
    data = open_data(own, config.eval.tokens, world)
    if checkpoint is not None and checkpoint.meta["data"] != data.fingerprint:
        require_tokenizer(checkpoint, data.tokenizer)
        raise UserError(
            f"checkpoint {checkpoint.path} was trained on other tokens than {data.place} holds now: "
            "prepare the same data again, or choose another run.dir"
        )
    world.watch.at("building the model")
    training = _build(config, world, directory, data, checkpoint, stop, log)
    broken = False
    try:
        outcome = train(training)
        world.watch.at("the sample and the summary")
        _finish(config, training, directory, data, outcome)
        return outcome.status.exit_code
    except (Exception, KeyboardInterrupt) as error:
        broken = distributed.broken_connection(error) or isinstance(error, KeyboardInterrupt)
        # An error of one rank ends the others through a broken connection; each says what it saw.
        line = out_of_memory_line(error, training.micro_batch)
        if world.is_main:
            reason = line or f"{type(error).__name__}: {one_line(error)}"
            directory.write_done(Status.failed.value, training.state.step, reason)
        if line is not None:
            raise RunFailed(_of_rank(world, line)) from error
        raise
    finally:
        # The lock is given back only when nothing is being written any more.
        training.checkpointer.close(wait=not broken)
        for output in (training.console, training.metrics, training.trackers):
            if output is not None:
                output.close()


def _of_rank(world: World, line: str) -> str:
    return f"rank {world.rank}: {line}" if world.size > 1 else line


def _build(
    config: TrainConfig,
    world: World,
    directory: RunDirectory,
    data: Data,
    checkpoint: Checkpoint | None,
    stop: StopRequest,
    log: ConsoleLog | None,
) -> Training:
    model_config = resolve_model(config.model, data.tokenizer.vocab_size, config.data.seq_len)
    precision, wanted = config.values.precision, config.values.micro_batch
    batch, seq_len = config.data.global_batch_size, config.data.seq_len
    one = precision.recipe.one_micro_batch
    if wanted is None and checkpoint is not None and not one:
        before = checkpoint.meta["micro_batch_size"]
        if batch % (world.size * before) == 0:
            wanted = before  # sums in the same order after a restart, and scales over the same samples
    size = sequence_bytes(model_config, config.parallel, world.device, seq_len, precision.recipe.dtypes.compute)
    micro_batch = micro_batch_size(wanted, batch, size, world, one=one)
    state = build_state(
        model_config,
        precision,
        config.parallel,
        config.optim,
        world,
        seed=config.seed,
        tokens=micro_batch * seq_len,
        pretrained=config.model.init_from if checkpoint is None else None,
        seq_len=seq_len,
        tokenizer=data.tokenizer,
    )
    meta = {
        "recipe": config.precision.identity(),
        "identity": identity(config),
        "data": data.fingerprint,
        "tokenizer": data.tokenizer.fingerprint,
        "world_size": world.size,
        "micro_batch_size": micro_batch,
    }
    source = training_source(data.training, world, seed=config.seed, global_batch=batch, micro_batch=micro_batch)
    state.position = source.position
    if config.train.spike is not SpikeAction.off:
        state.spikes = SpikeWatch(config.train.spike_window, config.train.spike_deviations)
        state.left_out = torch.zeros((), dtype=torch.int64)
    rolls_back = config.train.spike is SpikeAction.rollback
    checkpointer = Checkpointer(config.checkpoint, directory.checkpoints, world, meta, keep_scheduled=rolls_back)
    if checkpoint is not None:
        checkpointer.restore(state, checkpoint)
        state.plan.resume(state.step, config.train.steps)
    if world.is_main:
        say(_describe(config, world, state.model, micro_batch, data))
        if checkpoint is not None:
            say(f"resuming {directory.path} at step {state.step} of {config.train.steps}")
        for line in (*state.plan.notes, *([state.plan.coverage.short] if state.plan.coverage.quantized else [])):
            say(line)
    batches = separate_documents(source, config.data, data.tokenizer)
    if world.deferred:
        batches = Ahead(batches, threaded=source.position is None, pin=world.device.type == "cuda")
    validation, validation_bytes = None, 0.0
    if data.validation is not None:
        validation, validation_bytes = validation_source(
            data.validation, config.eval.tokens, config.data, data.tokenizer, world, micro_batch
        )
    with as_user_error("probe.", ValueError):
        probe = Probe(state.plan, every=config.probe.every, layers=config.probe.layers) if config.probe.every else None
    training = Training(
        world=world,
        state=state,
        source=batches,
        validation=validation,
        validation_bytes=validation_bytes,
        micro_batch=micro_batch,
        tokens_per_step=batch * seq_len,
        config=config.train,
        eval_config=config.eval,
        optim_config=config.optim,
        checkpointer=checkpointer,
        stop=stop,
        probe=probe,
    )
    env = environment(world, state.step) | {
        "parameters": num_parameters(state.model),
        "data": data.fingerprint,
        "state_bytes": state.num_bytes(),
        "compiled": config.parallel.compiles(world.device),
        "deterministic": config.parallel.is_deterministic(world.device),
    }
    world.on_main(lambda: directory.keep_tokenizer(config.data, data.tokenizer))
    world.on_main(lambda: directory.keep_files("recipe", config.precision.files()))
    world.on_main(lambda: directory.keep_files("model", model_files(config.model)))
    world.on_main(lambda: directory.write_start(config.to_yaml(), str(state.plan), env))
    training.evaluated_step = world.on_main(lambda: evaluated_step(directory.metrics))
    training.metrics = world.on_all(lambda: MetricsFile(directory.metrics) if world.is_main else None)
    if world.is_main:
        peak = _peak(world)
        training.console = Console(
            config.log,
            config.train.steps,
            state.step,
            memory=lambda: peak_memory(world.device),
            flops=flops_per_token(state.model, seq_len),
            peak=peak and world.size * peak,
            log=log,
        )
        training.trackers = Trackers(config.log, directory.path, config.nested())
    return training


def _describe(config: TrainConfig, world: World, model: Any, micro_batch: int, data: Data) -> str:
    batch = config.data.global_batch_size
    tokens = config.train.steps * batch * config.data.seq_len
    accumulated = batch // world.size // micro_batch
    if isinstance(data.training, TextStream):
        lanes = data.training.num_lanes(batch)
        size = sum(file.size for file in data.training.files)
        of = f"streamed from {len(data.training.files):,} files ({size / 1e9:,.2f} GB) in {lanes} lanes"
    else:
        of = f"{tokens / data.training.num_tokens:.2f} epochs"
    means, share = size_in_name(model), ""
    if (peak := _peak(world)) is not None:
        device = torch.cuda.get_device_name(world.device)
        share = (
            f"\nMFU: of {world.size} x {peak / 1e12:,.0f} TFLOP/s ({device}, dense BF16 products), at 6 N + 12 L d T = "
            f"{flops_per_token(model, config.data.seq_len) / 1e9:,.3g} GFLOP a token"
        )
    return (
        f"{config.model.name}: {num_parameters(model):,} parameters{f' ({means})' if means else ''}, "
        f"vocabulary {model.config.vocab_size:,}; "
        f"{config.precision.name} on {world.size} process{'es' if world.size > 1 else ''} ({world.device.type})\n"
        f"{config.train.steps:,} steps of {batch} x {config.data.seq_len} tokens = {tokens:,} tokens, "
        f"{of}; micro-batch {micro_batch}, accumulation {accumulated}{share}"
    )


def _peak(world: World) -> float | None:
    return peak_flops(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None


def _finish(config: TrainConfig, training: Training, directory: RunDirectory, data: Data, outcome: Outcome) -> None:
    """The last lines on the console, the sample, the picture; ``done.json`` comes last."""
    training.checkpointer.wait()
    text = None
    if outcome.status is Status.finished and config.sample.tokens:
        limit = training.state.model.config.position_limit or config.data.seq_len
        text = generate(
            training.state.model,
            data.tokenizer,
            config.sample,
            context=min(limit, config.data.seq_len),
            device=training.world.device,
        )
    if not training.world.is_main:
        return
    tell_checkpoints(training)
    totals = []
    if training.console is not None:
        training.console.close()
        totals = training.console.totals()
        training.console = None
    from .reporting.figures import plot_losses  # matplotlib: not before the first step

    try:
        plot_losses(directory.path, directory.path / "loss.png")
        if text is not None:
            (directory.path / "sample.txt").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        say(f"warning: {directory.path}: the sample or the picture cannot be written: {reason_of(error)}")
    if outcome.status is Status.finished:
        say("")
        totals += _summary(training, directory, text)
    for name, value in totals:
        say(f"{name:18} {value}")
    if outcome.status is not Status.finished:
        again = {Status.stopped: "the same command goes on", Status.diverged: "try a lower optim.lr"}
        hint = again.get(outcome.status, "mend the cause, then run the same command again")
        say(f"{outcome.status.value} at step {outcome.step}: {outcome.reason}; {hint} ({directory.path})")
    directory.write_done(outcome.status.value, outcome.step, outcome.reason)


def _summary(training: Training, directory: RunDirectory, text: str | None) -> list[tuple[str, str]]:
    """What a finished run came to, besides its totals."""
    rows = []
    if (row := training.last_eval) is not None:
        rows = [
            ("validation loss", f"{row['loss']:.4f} nats per token, over {row['tokens']:,} tokens"),
            ("perplexity", f"{row['perplexity']:.3f}"),
            ("bits per byte", f"{row['bits_per_byte']:.4f}"),
        ]
    if text is not None:
        rows.append(("sample", text))
    if checkpoints := list_checkpoints(directory.checkpoints):
        rows.append(("checkpoint", str(checkpoints[-1])))
    return [*rows, ("loss curve", str(directory.path / "loss.png")), ("run directory", str(directory.path))]
