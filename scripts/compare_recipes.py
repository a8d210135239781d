"""Train recipes at equal seeds and data and tabulate them: python scripts/compare_recipes.py recipes=bf16,nvfp4 [...]

[recipes=bf16,fp8_delayed,fp8_current,mxfp8,mxfp4,nvfp4] [seeds=0,1,2] [out=runs/compare] [processes=2] and any
overrides of the trainer, the same for all: train.steps=250 optim.lr=1e-3 ...

Every run is a torchrun of its own in out/RECIPE-seedN; one that is finished is not run again, one that was interrupted
goes on. Writes out/table.md: final validation loss, its gap to BF16 at the same seed (mean over seeds, and all of
them), median tokens/s. Emulated: the speed is that of this machine, not of narrow hardware.
"""

import statistics
import subprocess
import sys
from pathlib import Path

from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.metrics import read_metrics

BASELINE = "bf16"


def main(
    overrides: list[str],
    *,
    recipes: str = "bf16,fp8_delayed,fp8_current,mxfp8,mxfp4,nvfp4",
    seeds: str = "0,1,2",
    out: str = "runs/compare",
    processes: int = 2,
) -> None:
    root = Path(out)
    names, numbers = recipes.split(","), seeds.split(",")
    for seed in numbers:  # seed by seed, so that an early table compares like with like
        for name in names:
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(processes),
            ]
            command += ["-m", "narrowgauge", *overrides, f"precision={name}", f"seed={seed}"]
            failed = subprocess.run([*command, f"run.dir={root / f'{name}-seed{seed}'}"], check=False).returncode
            if failed:
                print(f"{name}, seed {seed}: ended with code {failed}; going on", file=sys.stderr)
        (root / "table.md").write_text(_table(root, names, numbers), encoding="utf-8")
    print(_table(root, names, numbers))


def _table(root: Path, names: list[str], seeds: list[str]) -> str:
    losses = {name: _final_losses(root, name, seeds) for name in names}
    lines = [
        "| recipe | final validation loss, by seed | mean gap to BF16 | gap by seed | tokens/s (emulated) |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        shown = ", ".join(f"{loss:.4f}" for loss in losses[name].values()) or "none finished"
        base = losses.get(BASELINE, {})
        gaps = [loss - base[seed] for seed, loss in losses[name].items() if seed in base]
        mean = f"{statistics.mean(gaps):+.4f}" if gaps and name != BASELINE else "-"
        each = ", ".join(f"{gap:+.4f}" for gap in gaps) if gaps and name != BASELINE else "-"
        lines.append(f"| {name} | {shown} | {mean} | {each} | {_speed(root, name, seeds)} |")
    return "\n".join(lines) + "\n"


def _final_losses(root: Path, name: str, seeds: list[str]) -> dict[str, float]:
    found = {}
    for seed in seeds:
        run = root / f"{name}-seed{seed}"
        if (run / "done.json").exists() and '"finished"' in (run / "done.json").read_text(encoding="utf-8"):
            rows = read_metrics(run / "metrics.jsonl", "eval")
            found[seed] = rows[max(rows)]["loss"]
    return found


def _speed(root: Path, name: str, seeds: list[str]) -> str:
    rates = [
        row["tokens_per_second"]
        for seed in seeds
        if (root / f"{name}-seed{seed}" / "metrics.jsonl").exists()
        for row in read_metrics(root / f"{name}-seed{seed}" / "metrics.jsonl", "train").values()
    ]
    return f"{statistics.median(rates):,.0f}" if rates else "-"


if __name__ == "__main__":
    script_main(main, __doc__)
