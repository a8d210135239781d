"""Processes: the group they form, and what they agree on."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch._inductor import config as inductor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .errors import RunFailed, UserError, one_line, require_at_least
from .machine import threads_of_process
from .watch import Watch

T = TypeVar("T")
FLIGHTS = "flight_recorder_rank_"  # torch appends the rank
_LATE = ("Timed out waiting", "Application timeout")
_BROKEN = (*_LATE, "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
_CHECKPOINT_SECONDS = 24 * 3600  # of a collective of the checkpoint thread: a slow disk is no reason to end a run
_CONNECT = timedelta(seconds=60)  # to the launcher, which is there before its workers
_ASK_SECONDS = 0.1
_ALONE_SECONDS = 30.0  # that rank 0 waits for the others before it says so
_ATTEMPT = "narrowgauge/attempt"
_watching: list[Watch] = []


@dataclass(kw_only=True)
class ParallelConfig:
    """How the model is spread over processes."""

    name: str
    replicate: int = 1  # copies of the sharded model (HSDP); 1 shards over all processes (FSDP)
    # true, false, or auto, which the methods below resolve:
    reshard_after_forward: Any = "auto"  # gather parameters again in backward, instead of keeping them
    compile: Any = "auto"  # torch.compile each block; changes the loss by rounding only
    deterministic: Any = "auto"  # on CUDA every sum in an order of its own choice, or always the same
    fp8_all_gather: bool = False  # gather weights as the codes that GEMMs read, where that changes nothing
    activation_checkpointing: bool = False  # recompute each block in backward
    threads: int | None = None  # CPU threads a process; null shares the cores out
    timeout_seconds: int = 1800  # of a collective while training
    start_timeout_seconds: int = 7200  # of one before: other processes may be checking files, or arrive late

    def validate(self) -> None:
        """Raises ValueError for counts below one, words that say nothing, and for gathered codes that would be held."""
        for name in ("reshard_after_forward", "compile", "deterministic"):
            value = getattr(self, name)
            if not isinstance(value, bool) and value != "auto":
                raise ValueError(f"parallel.{name}={value}: must be auto, true or false")
        require_at_least("parallel", self, replicate=1, threads=1, timeout_seconds=1, start_timeout_seconds=1)
        if self.fp8_all_gather and self.reshard_after_forward is False:
            raise ValueError(
                "parallel.fp8_all_gather=true needs parallel.reshard_after_forward=true: "
                "weights that are kept may be read in high precision later"
            )

    def reshards(self, world_size: int) -> bool:
        """auto: where there is more than one shard, so that one process copies every parameter once, not twice."""
        return world_size > self.replicate if self.reshard_after_forward == "auto" else self.reshard_after_forward

    def compiles(self, device: torch.device) -> bool:
        """auto: on CUDA, where norms, rotations and SwiGLU are single kernels only if compiled."""
        return device.type == "cuda" if self.compile == "auto" else self.compile

    def is_deterministic(self, device: torch.device) -> bool:
        """auto: on a CPU, where there is no other way."""
        return device.type == "cpu" or self.deterministic is True


@dataclass
class World:
    """This process among the others."""

    rank: int
    size: int
    local_size: int
    device: torch.device
    control: Any  # gloo group for small messages, of the main thread: until training begins one that waits longer
    checkpoint: Any  # gloo group of the checkpoint thread: two threads must not share one
    deferred: bool = False  # decide on the device about a step, and read its numbers while the next one is computed
    watch: Watch = field(default_factory=Watch)
    steps: Any = None  # what ``control`` is while training

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def begin_training(self) -> None:
        """From now on ranks wait for one another as long as ``parallel.timeout_seconds`` says."""
        if self.steps is not None:
            self.control = self.steps
        self.watch.training()

    def sum(self, *values: float) -> list[float]:
        """Each value summed over ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, *values: float) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: tuple[float, ...], op: Any) -> list[float]:
        if self.size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        with self.watch.waiting():
            dist.all_reduce(tensor, op, group=self.control)
        return tensor.tolist()

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` [of the host] summed over ranks, in place."""
        if self.size > 1:
            with self.watch.waiting():
                dist.all_reduce(tensor, dist.ReduceOp.SUM, group=self.control)
        return tensor

    def add_up_there(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` [of this rank's device] summed over ranks, in place, without waiting for the device."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def on_main(self, function: Callable[[], T]) -> T:
        """``function()`` of rank 0, on all ranks; a UserError there is raised on all of them."""
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = function()
            except (UserError, OSError) as error:
                box[1] = _message(error)
        if self.size > 1:
            with self.watch.waiting():
                dist.broadcast_object_list(box, src=0, group=self.control)
        if box[1] is not None:
            raise UserError(box[1])
        return box[0]

    def on_all(self, function: Callable[[], T]) -> T:
        """``function()`` on every rank; the first UserError of any is raised on all, so that none waits for ever."""
        result, error = None, None
        try:
            result = function()
        except (UserError, OSError) as caught:
            error = _message(caught)
        errors = self.gather(error)
        if (first := next((text for text in errors if text is not None), None)) is not None:
            raise UserError(first)
        return result  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, on all ranks; of small things."""
        with self.watch.waiting():
            return self._gather(value, self.control)

    def gather_written(self, value: T) -> list[T]:
        """``gather`` of the checkpoint thread, which waits as long as a disk may take."""
        return self._gather(value, self.checkpoint)

    def _gather(self, value: T, group: Any) -> list[T]:
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group)
        return values

    def mesh(self, config: ParallelConfig) -> DeviceMesh:
        """The device mesh: [shard], or [replicate, shard].

        Raises UserError if the copies do not divide the processes.
        """
        if self.size % config.replicate:
            raise UserError(f"parallel.replicate={config.replicate} does not divide the {self.size} processes")
        if config.replicate == 1:
            return init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("shard",))
        shape = (config.replicate, self.size // config.replicate)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))


ALONE = World(0, 1, 1, torch.device("cpu"), None, None)
"""A process without a group."""


def _message(error: UserError | OSError) -> str:
    if isinstance(error, UserError) or not error.strerror:
        return one_line(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def start(config: ParallelConfig) -> World:
    """Join the process group that torchrun announces in the environment, or form one of a single process."""
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    # cuBLAS may otherwise add up the parts of a long sum in the narrow type: no longer FP32 sums, rounded once.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if not cuda:
        _keep_freed_memory()
    elif config.deterministic is True:
        _fix_order_of_sums()
    threads = config.threads or (threads_of_process(local_size) if not cuda else None)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    step, start = (timedelta(seconds=seconds) for seconds in (config.timeout_seconds, config.start_timeout_seconds))
    store, rank, size, beats = _meet(start)
    watch = Watch(rank, size, beats)
    watch.start()
    _watching.append(watch)
    try:
        dist.init_process_group(backend, timeout=step, store=store, rank=rank, world_size=size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            device = PartialState(cpu=not cuda).device
        starting, steps = (dist.new_group(backend="gloo", timeout=timeout) for timeout in (start, step))
        checkpoint = dist.new_group(backend="gloo", timeout=timedelta(seconds=_CHECKPOINT_SECONDS))
    except RuntimeError as error:
        raise RunFailed(f"rank {rank}: the processes cannot reach one another: {one_line(error)}") from error
    # A CPU has no queue that runs on while a number is read, and is the reference: its norm is summed tensor by tensor.
    return World(rank, size, local_size, device, starting, checkpoint, device.type != "cpu", watch, steps)


def _meet(limit: timedelta) -> tuple[dist.Store, int, int, dist.Store | None]:
    """A store for the process group, this rank, the number of ranks, and a connection of its own to that store.

    torchrun's agent has one store over restarts, in which the addresses of processes that are gone still stand; so
    the ranks of one attempt agree on a prefix. They cannot take it from the number of restarts, which agents on several
    hosts count each for itself: rank 0 draws one, and a rank is sure of it once rank 0 has read the rank's own token
    under it.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return dist.HashStore(), 0, 1, None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _choose_interface(host, port)
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves, connect = rank == 0 and not of_agent, min(_CONNECT, limit) if of_agent else limit
    try:
        store = dist.TCPStore(
            host, port, is_master=serves, timeout=connect, wait_for_workers=False, multi_tenant=serves
        )
        store.set_timeout(limit)
        prefix = _agree(store, rank, size, limit)
    except RuntimeError as error:
        raise RunFailed(f"rank {rank}: no store at {host}:{port}, where ranks meet: {one_line(error)}") from error
    return dist.PrefixStore(prefix, store), rank, size, dist.PrefixStore(prefix, store.clone())


def _agree(store: dist.Store, rank: int, size: int, limit: timedelta) -> str:
    """The prefix of this attempt. Raises RunFailed naming the ranks that do not come."""
    token, deadline = uuid.uuid4().hex, time.monotonic() + limit.total_seconds()
    pause = _ASK_SECONDS * max(1, size // 64)  # one store answers them all
    if rank == 0:
        prefix = f"narrowgauge/{token}"
        store.set(_ATTEMPT, prefix)
        keys = [f"{prefix}/joins/{other}" for other in range(1, size)]
        say_at = time.monotonic() + _ALONE_SECONDS
        while not store.check(keys):
            now = time.monotonic()
            if now > min(deadline, say_at):
                missing = [str(other) for other, key in enumerate(keys, 1) if not store.check([key])]
                if now > deadline:
                    raise RunFailed(f"of {size} ranks {', '.join(missing)} did not come {_within(limit)}")
                say(f"waiting for rank {', '.join(missing[:8])}{' ...' * (len(missing) > 8)} of {size} to start")
                say_at = now + 2 * (now - say_at + _ALONE_SECONDS)
            time.sleep(pause)
        store.set(f"{prefix}/met", json.dumps([store.get(key).decode() for key in keys]))
        return prefix
    joined = ""
    while time.monotonic() < deadline:
        if store.check([_ATTEMPT]):
            prefix = store.get(_ATTEMPT).decode()
            if prefix != joined:  # else it stands already
                store.set(f"{prefix}/joins/{rank}", token)
                joined = prefix
            if store.check([f"{prefix}/met"]) and json.loads(store.get(f"{prefix}/met"))[rank - 1] == token:
                return prefix
        time.sleep(pause)
    raise RunFailed(f"rank {rank}: rank 0 did not come {_within(limit)}")


def _within(limit: timedelta) -> str:
    return f"within parallel.start_timeout_seconds={limit.total_seconds():.0f}"


def _choose_interface(host: str, port: int) -> None:
    """Where there are several hosts: have gloo use the interface that leads to where they meet, not the host's name."""
    if "GLOO_SOCKET_IFNAME" in os.environ or os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing: it only asks for the route
            own = probe.getsockname()[0]
    except OSError:
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == own for entry in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name


def record_flights(directory: Path) -> None:
    """Have torch's flight recorder keep the last collectives; NCCL's watchdog writes them to ``directory`` itself.

    Before the process group is formed: torch reads these once.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):  # as versions of torch call it
        os.environ.setdefault(name, str(directory.absolute() / FLIGHTS))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def broken_connection(error: BaseException) -> bool:
    """Whether ``error`` is of a collective that another rank did not end."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _BROKEN)


def explain_broken(error: BaseException, world: World, directory: Path) -> str:
    """One line about a collective that another rank did not end.

    After a time limit torch's flight recorder is written to ``directory``.
    """
    where = f"in: {world.watch.section}"
    if not any(words in str(error) for words in _LATE):
        return f"rank {world.rank} lost the connection to another rank {where}; what that one, or torchrun, says is why"
    file = directory / f"{FLIGHTS}{world.rank}.json"
    try:
        file.write_bytes(torch._C._distributed_c10d._dump_fr_trace_json())
        recorded = f"; the last collectives are in {file}"
    except (OSError, AttributeError, RuntimeError):
        recorded = ""
    accused = world.watch.accuse() or "no heartbeat tells of which"
    return f"rank {world.rank} waited in vain for another rank {where}: {accused}{recorded}"


def _fix_order_of_sums() -> None:
    """Have the same kernels add in the same order whenever the same is computed. Before CUDA starts: cuBLAS reads once.

    An operation that cannot do so then raises RuntimeError, rather than warn.
    """
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a search for errors, which writes all memory twice
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    inductor.deterministic = True  # no timing decides about a kernel whose sums depend on it


def _keep_freed_memory() -> None:
    """Let glibc keep what torch frees: it would give every large temporary back, and fault it in again each time."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # M_* of malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 << 20)


def finish() -> None:
    """Leave the process group.

    The watch ends before the interpreter does: a thread that is then within the store's C++ code ends the process by
    SIGABRT.
    """
    while _watching:
        _watching.pop().stop()
    if dist.is_initialized():
        dist.destroy_process_group()
    PartialState._reset_state()


def say(text: str) -> None:
    """Print one line; a closed terminal or pipe must not end a run."""
    try:
        print(text, file=sys.stdout, flush=True)
    except (BrokenPipeError, ValueError, OSError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
