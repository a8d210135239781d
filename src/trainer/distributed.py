"""Processes: the group they form, what they agree on, and when they must stop."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch._inductor import config as inductor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer.errors import UserError, one_line
from trainer.machine import available_cores

T = TypeVar("T")
LOST_LAUNCHER = 255  # beside the signal numbers

# Taken at import, before anything can have died: an orphan's parent is no longer this process.
_PARENT = os.getppid()


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
    timeout_seconds: int = 1800  # of a collective

    def validate(self) -> None:
        """Raises ValueError for counts below one, words that say nothing, and for gathered codes that would be kept."""
        for field in ("reshard_after_forward", "compile", "deterministic"):
            value = getattr(self, field)
            if not isinstance(value, bool) and value != "auto":
                raise ValueError(f"parallel.{field}={value}: must be auto, true or false")
        for field in ("replicate", "threads", "timeout_seconds"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"parallel.{field}={value}: must be at least 1")
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


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    local_size: int
    device: torch.device
    control: Any  # gloo group for small messages, of the main thread
    checkpoint: Any  # gloo group of the checkpoint thread: two threads must not share one
    deferred: bool = False  # decide on the device about a step, and read its numbers while the next one is computed

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, *values: float) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: tuple[float, ...], op: Any) -> list[float]:
        if self.size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op, group=self.control)
        return tensor.tolist()

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` [of the host] summed over ranks, in place."""
        if self.size > 1:
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
        errors: list[str | None] = [None] * self.size
        dist.all_gather_object(errors, error, group=self.control)
        if (first := next((text for text in errors if text is not None), None)) is not None:
            raise UserError(first)
        return result  # type: ignore[return-value]

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
    # torchrun sets OMP_NUM_THREADS=1 for more than one process, which idles all cores but one each.
    if not cuda:
        _keep_freed_memory()
    elif config.deterministic is True:
        _fix_order_of_sums()
    threads = config.threads or (max(1, available_cores() // local_size) if not cuda else None)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    timeout = timedelta(seconds=config.timeout_seconds)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        device = PartialState(cpu=not cuda).device
    control, checkpoint = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    # A CPU has no queue that runs on while a number is read, and is the reference: its norm is summed tensor by tensor.
    deferred = device.type != "cpu"
    return World(dist.get_rank(), dist.get_world_size(), local_size, device, control, checkpoint, deferred)


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
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
    PartialState._reset_state()


def launched_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def launcher_pid() -> int:
    """The process that ends this run when it is killed: torchrun, or this process itself."""
    return _PARENT if launched_by_torchrun() else os.getpid()


class StopRequest:
    """Whether this process was asked to stop: SIGTERM, SIGUSR1, Ctrl-C, or the launcher is gone.

    torchrun's workers live in sessions of their own, so a killed launcher leaves them training: they look themselves.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self._code = 0

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._on_signal) for number in self._SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._code:
            raise KeyboardInterrupt  # asked twice: do not wait for the step
        self._code = number

    @property
    def code(self) -> int:
        """0, or the number of the signal, or LOST_LAUNCHER. Cheap enough to ask at every step."""
        if not self._code and launched_by_torchrun() and os.getppid() != _PARENT:
            self._code = LOST_LAUNCHER
        return self._code

    @staticmethod
    def describe(code: int) -> str:
        return "the launcher is gone" if code == LOST_LAUNCHER else signal.Signals(code).name


def say(text: str) -> None:
    """Print one line; a closed terminal or pipe must not end a run."""
    try:
        print(text, file=sys.stdout, flush=True)
    except (BrokenPipeError, ValueError, OSError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
