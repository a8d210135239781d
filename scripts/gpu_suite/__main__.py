"""One stage in this process: python -m gpu_suite stage=NAME size=1b rows=FILE folder=DIR until=SECONDS

Writes rows to ``rows`` as JSON, a line each, the machine first. ``gpu_run.py`` starts it and watches over it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(arguments: list[str]) -> None:
    words = dict(argument.partition("=")[::2] for argument in arguments)
    own = {name: words.pop(name) for name in ("stage", "size", "rows", "folder", "until")}
    what = words.pop("what", "")
    import torch  # after the arguments: it takes seconds

    if own["stage"] in ("quantize", "check") and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    from gpu_suite import stages

    task = stages.Task(own["size"], Path(own["folder"]), float(own["until"]))
    with Path(own["rows"]).open("a", encoding="utf-8") as file:

        def emit(row: stages.Row) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(row, flush=True)

        emit({"machine": stages.machine()})
        if own["stage"] == "one":
            rows = stages.one(task, what, [f"{key}={value}" for key, value in words.items()])
        else:
            rows = getattr(stages, own["stage"])(task)
        for row in rows:
            emit(row)


if __name__ == "__main__":
    main(sys.argv[1:])
