"""scripts/bench_state.py on two processes, forked so that imports are paid for once: python state_bytes.py MOMENTS"""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import bench_state

TINY = ["data.tokenizer=bytes", "data.seq_len=16", "data.global_batch_size=4", "model.num_layers=2"]


def main(rank: int, port: int, moments: str) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
    bench_state.main([*TINY, "parallel.threads=1"], moments=moments, as_json=1)


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=main, args=(rank, port, sys.argv[1])) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))
