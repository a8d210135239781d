"""The tables of docs/kernels.md: what every Triton kernel moves and needs, by compiling it; no GPU is asked.

    python scripts/kernel_table.py                      print the tables
    python scripts/kernel_table.py docs/kernels.md      put them into the page, between its markers

Times are arithmetic: bytes over the memory bandwidth on the data sheet. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from narrowgauge.precision.backends.triton.device import Launch, recording
from torch import Tensor
from triton_aot import ARCHITECTURES, WRITTEN, cases, compile

ELEMENTS = 8192 * 8192
BANDWIDTHS = {"H100": 3.35e12, "B200": 8.0e12}  # bytes a second, SXM, data sheets
MARK = "<!-- kernel_table: {} -->"


def moved(launch: Launch) -> tuple[float, float]:
    """Bytes that a launch reads and writes, by element: every tensor it is given, once."""
    read = written = 0
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor):
            size = value.numel() * value.element_size()
            output = {} if launch.arguments.get("AMAX_ONLY") else WRITTEN[launch.kernel.__name__]
            written += size if name in output else 0
            read += size if name not in output or output[name] else 0
    return read / ELEMENTS, written / ELEMENTS


def least(launches: list[Launch]) -> float:
    """Bytes, by element, that no kernel can do without: what the last launch moves, which reads and writes it all."""
    return sum(moved(launches[-1]))


def traffic() -> list[str]:
    lines = [
        "| call | launches | read | written | minimum | of minimum | H100 | B200 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, call in cases().items():
        with recording((9, 0)) as launches:
            call()
        if not all(launch.kernel.__name__ in WRITTEN for launch in launches):
            continue
        read, written = (sum(part) for part in zip(*map(moved, launches), strict=True))
        floor = least(launches)
        times = " | ".join(f"{(read + written) * ELEMENTS / rate * 1e6:.0f} us" for rate in BANDWIDTHS.values())
        lines.append(
            f"| {name} | {len(launches)} | {read:.3f} | {written:.3f} | {floor:.3f} "
            f"| {(read + written) / floor:.2f} | {times} |"
        )
    return lines


def resources() -> list[str]:
    lines = [
        "| call | kernel | warps | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |",
        "|---|---|---|" + "---|" * len(ARCHITECTURES),
    ]
    for name, call in cases().items():
        rows: dict[str, list[str]] = {}
        for architecture in ARCHITECTURES:
            with recording(divmod(architecture, 10)) as launches:
                call()
            for launch in launches:
                code = compile(launch, architecture)
                spilled = f", {code.spilled} spilled" if code.spilled else ""
                cell = f"{code.registers}, {code.shared}, {code.count('bar.sync')}{spilled}"
                rows.setdefault(f"{launch.kernel.__name__} | {launch.num_warps}", []).append(cell)
        lines += [f"| {name} | {kernel} | {' | '.join(cells)} |" for kernel, cells in rows.items()]
    return lines


def main() -> None:
    tables = {"traffic": traffic(), "resources": resources()}
    if len(sys.argv) == 1:
        print("\n\n".join("\n".join(table) for table in tables.values()))
        return
    page = Path(sys.argv[1])
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        mark = MARK.format(name)
        filled = f"{mark}\n" + "\n".join(table) + f"\n{mark}"
        text, count = re.subn(f"{mark}.*?{mark}", filled, text, flags=re.DOTALL)
        if count != 1:
            sys.exit(f"{page} has no pair of markers {mark}")
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
