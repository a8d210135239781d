"""Several runs one after the other in one process group, to pay for its start once: torchrun many.py FILE.json

A second argument is the seconds that the checksum of a checkpoint's index shall take.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from narrowgauge.trainer import checkpointer, distributed
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.run import run

if __name__ == "__main__":
    configs = [load_config(overrides) for overrides in json.loads(Path(sys.argv[1]).read_text())]
    world, finish = distributed.start(configs[0].parallel), distributed.finish
    distributed.start, distributed.finish = lambda config: replace(world), lambda: None
    if len(sys.argv) > 2:
        seconds, real = float(sys.argv[2]), checkpointer.sha256_of
        checkpointer.sha256_of = lambda file: (time.sleep(seconds * (file.name == ".metadata")), real(file))[1]
    codes = [run(config) for config in configs]
    finish()
    sys.exit(max(codes))
