"""Confirm or refute every claim about GPUs on this machine, in some ten minutes:

python scripts/gpu_check.py [WORD ...]     # of the checks, those whose name has one of the words

Prints one table. Exit code 1 if a claim fails. Without a GPU, Triton kernels run in the interpreter on small shapes,
and the rest says "not on this machine".
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))

import checks


def main(words: list[str]) -> int:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    arch = f"sm_{checks.ARCH}" if checks.ARCH is not None else "no architecture of the table"
    print(f"{gpu}, {arch}, torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    print(f"{'check':48} {'claim':28} {'result':8} measured")
    failed = 0
    for check in checks.CHECKS:
        if words and not any(word.lower() in check.name.lower() for word in words):
            continue
        try:
            outcome = check.run()
        except Exception as error:  # a refusal of hardware or library is a result, too
            traceback.print_exc(limit=-3)
            outcome = checks.Outcome(False, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
        result = {True: "ok", False: "FAIL", None: "-"}[outcome.ok]
        failed += outcome.ok is False
        measured = f"{outcome.measured}{'; ' if outcome.time else ''}{outcome.time}"
        print(f"{check.name:48} {check.claim:28} {result:8} {measured}", flush=True)
    print(f"\n{failed} claims fail" if failed else "\nno claim fails")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
