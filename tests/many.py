"""Several runs one after the other in one process group, to pay for its start once: torchrun many.py FILE.json"""

import json
import sys
from pathlib import Path

from trainer import distributed
from trainer.config import load_config
from trainer.run import run

if __name__ == "__main__":
    configs = [load_config(overrides) for overrides in json.loads(Path(sys.argv[1]).read_text())]
    world, finish = distributed.start(configs[0].parallel), distributed.finish
    distributed.start, distributed.finish = lambda config: world, lambda: None
    codes = [run(config) for config in configs]
    finish()
    sys.exit(max(codes))
