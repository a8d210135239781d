"""From which outlier on does FP8 training suffer, and Smooth-SwiGLU not? python scripts/experiments/swiglu_outliers.py

[strengths=4,16,32,64,128] [seeds=0,1,2] [arms=bf16,fp8_delayed,smooth_channel,smooth_token] [channels=2]
[pretrain=300] [steps=80] [out=runs/swiglu_outliers] and any overrides of the trainer, the same for all runs. More arms:
fp8_current, fp8_full, and moments_M_V with the formats of Adam's two moments.

In long runs weight decay aligns the gate and up weights of a few SwiGLU channels, whose product then grows with the
square of the weights (arXiv 2409.12517). A short run does not get there, so the alignment is made:

1. For each seed a small Llama is trained in BF16 for ``pretrain`` steps.
2. In every block the least used ``channels`` channels get gate row = up row = strength * v, with v the unit vector
   along which the MLP's input for one token (one in some 200) differs from the mean. Their columns of down_proj shrink
   as much as their values grow, so the function hardly changes: what changes is what an 8-bit cast of h sees.
3. From this start, the same for all arms, each arm trains for ``steps`` steps on the same batches at a constant rate,
   and is validated in its own precision.

Every run is a run directory in ``out``; one that is done is not run again. Writes results.json, table.md and gaps.png
there: the gap to BF16 of the same start in loss before training (over some training text) and in validation loss after
it, from which strength on every seed loses more than 0.05 nats, and how the outlier stood at the start: ``spread``
(largest value of h over the median of the channels' maxima) and ``lost`` (non-zero values of h that one E4M3 scale for
the tensor rounds to zero), both means over blocks.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from narrowgauge.precision.apply import apply
from narrowgauge.precision.loading import load
from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.data.config import DataConfig
from narrowgauge.trainer.data.open import open_windows
from narrowgauge.trainer.data.prepare import prepare
from narrowgauge.trainer.data.tokenizer import load_tokenizer
from narrowgauge.trainer.errors import ExitCode
from narrowgauge.trainer.metrics import read_metrics
from narrowgauge.trainer.run import run
from narrowgauge.trainer.tools.export import export_run
from scipy import stats
from torch import Tensor, nn

BASELINE = "bf16"
ARMS = {
    "bf16": ["precision=bf16"],
    "fp8_delayed": ["precision=fp8_delayed"],
    "fp8_current": ["precision=fp8_current"],
    "smooth_channel": ["precision=smooth_swiglu", "precision.args.form=channel"],
    "smooth_token": ["precision=smooth_swiglu", "precision.args.form=token"],
    "fp8_full": ["precision=fp8_full"],
    # Formats of the two moments, in BF16: the paper's, and each with the other's.
    "moments_e4m3_e5m2": ["precision=bf16", "optim.moments={m: e4m3_240/tensor, v: e5m2/tensor}"],
    "moments_e5m2_e5m2": ["precision=bf16", "optim.moments={m: e5m2/tensor, v: e5m2/tensor}"],
    "moments_e4m3_e4m3": ["precision=bf16", "optim.moments={m: e4m3_240/tensor, v: e4m3_240/tensor}"],
}
COMMON = [
    "model=llama_tiny",
    "model.hidden_size=128",
    "model.intermediate_size=352",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.num_kv_heads=4",
    "data.tokenizer=bytes",  # a small vocabulary: the MLPs are most of the model
    "data.seq_len=128",
    "data.global_batch_size=16",
    "train.micro_batch_size=16",
    "checkpoint.every=0",
    "checkpoint.keep_last=1",
    "eval.every=0",
    "eval.tokens=20000",
    "sample.tokens=0",
    "log.every=1000",
]
PROBED_TOKENS = 16_384
MARGIN = 0.05  # nats a token
E4M3_LOST = 2.0**-10 / 448  # of the tensor's maximum: half of the least value


def main(
    overrides: list[str],
    *,
    strengths: str = "4,16,32,64,128",
    seeds: str = "0,1,2",
    arms: str = "bf16,fp8_delayed,smooth_channel,smooth_token",
    channels: int = 2,
    pretrain: int = 300,
    steps: int = 80,
    out: str = "runs/swiglu_outliers",
) -> None:
    root = Path(out)
    common = [*COMMON, f"data.shards={root / 'shards'}", *overrides]
    prepare(load_config(common).data, workers=1)
    results: list[dict[str, Any]] = []
    for seed in seeds.split(","):
        trained = root / f"base-seed{seed}"
        _train(trained, [*common, "precision=bf16", f"seed={seed}", f"train.steps={pretrain}"])
        exported = root / "starts" / trained.name
        if not (exported / "config.json").exists():
            export_run(trained, exported)
        for strength in map(float, strengths.split(",")):
            start = root / "starts" / f"seed{seed}-strength{strength:g}"
            if not (start / "outliers.json").exists():
                _inject(exported, start, strength, channels, common)
            measured = json.loads((start / "outliers.json").read_text(encoding="utf-8"))
            after = [f"model.init_from={start}", f"train.steps={steps}", f"seed={int(seed) + 1000}"]
            after += ["optim.lr=1e-3", "optim.schedule=constant"]
            for arm in arms.split(","):
                directory = root / f"{arm}-strength{strength:g}-seed{seed}"
                _train(directory, [*common, *after, *ARMS[arm]])
                row = {"arm": arm, "strength": strength, "seed": int(seed), **measured}
                results.append({**row, "start_loss": _start_loss(start, arm, common), **_outcome(directory)})
            # Seed by seed, so that an early table compares like with like.
            (root / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (root / "table.md").write_text(_table(results), encoding="utf-8")
            _plot(results, root / "gaps.png")
    print((root / "table.md").read_text(encoding="utf-8"))


def _train(directory: Path, overrides: list[str]) -> None:
    if not (directory / "done.json").exists():
        code = run(load_config([*overrides, f"run.dir={directory}"]))
        if code not in (ExitCode.FINISHED, ExitCode.DIVERGED):
            raise SystemExit(code)


def _outcome(directory: Path) -> dict[str, Any]:
    rows = read_metrics(directory / "metrics.jsonl", "eval")
    status = json.loads((directory / "done.json").read_text(encoding="utf-8"))["status"]
    loss = rows[max(rows)]["loss"] if rows and status == "finished" else None
    skipped = sum("skipped" in row for row in read_metrics(directory / "metrics.jsonl", "train").values())
    return {"loss": loss, "status": status, "skipped": skipped}


@torch.no_grad()
def _inject(base: Path, target: Path, strength: float, channels: int, common: list[str]) -> None:
    """Write ``base`` with outliers in every block to ``target``, and what they are like to ``outliers.json``."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    tokens = _probed(load_config(common).data)
    counts = tokens.flatten().bincount()
    token = int((counts - tokens.numel() / 200).abs().argmin())
    injected = []
    for block in model.model.layers:  # one after the other, as each changes what the next one reads
        x, h = _probe(model, block.mlp, tokens)
        mlp, of_token = block.mlp, (tokens == token).flatten()
        v = x[of_token].mean(0) - x.mean(0)
        v /= v.norm()
        used = h.abs().amax(0) * mlp.down_proj.weight.norm(dim=0)
        chosen = used.argsort()[:channels]
        mlp.gate_proj.weight[chosen] = mlp.up_proj.weight[chosen] = strength * v
        grown = _probe(model, block.mlp, tokens)[1][:, chosen].abs().amax(0)
        mlp.down_proj.weight[:, chosen] *= h[:, chosen].abs().amax(0) / grown
        injected.append(chosen)
    spread, lost = [], []
    for block, chosen in zip(model.model.layers, injected, strict=True):
        maxima = (h := _probe(model, block.mlp, tokens)[1].abs()).amax(0)
        others = torch.ones_like(maxima, dtype=torch.bool)
        others[chosen] = False
        spread.append(float(maxima.max() / maxima[others].median()))
        lost.append(float(((h > 0) & (h < maxima.max() * E4M3_LOST)).sum() / (h > 0).sum()))
    model.save_pretrained(target)
    measured = {"spread": statistics.mean(spread), "lost": statistics.mean(lost), "token": token}
    (target / "outliers.json").write_text(json.dumps(measured) + "\n", encoding="utf-8")


@torch.no_grad()
def _start_loss(start: Path, arm: str, common: list[str]) -> float:
    """Loss in nats a token of the start over the probed text, its products as the arm computes them."""
    cached = start / f"loss-{arm}.json"
    if not cached.exists():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            start, local_files_only=True, trust_remote_code=False
        ).bfloat16()
        config = load_config([*common, *ARMS[arm]])
        plan = apply(load(config.precision.recipe, config.precision.args), model)
        plan.forget()
        losses = [float(model(input_ids=part, labels=part).loss) for part in _probed(config.data).split(16)]
        cached.write_text(json.dumps(statistics.mean(losses)), encoding="utf-8")
    return float(json.loads(cached.read_text(encoding="utf-8")))


def _probed(data: DataConfig) -> Tensor:
    """Tokens [windows, positions] of the training split."""
    windows = open_windows(data, load_tokenizer(data.tokenizer, data.eot_token), "train", PROBED_TOKENS)
    return torch.stack([torch.from_numpy(windows.window(i)[:-1]) for i in range(PROBED_TOKENS // data.seq_len)])


def _probe(model: nn.Module, mlp: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What an MLP reads [tokens, hidden], and its down-projection [tokens, channels]."""
    seen: dict[nn.Module, list[Tensor]] = {mlp: [], mlp.down_proj: []}  # type: ignore[dict-item]
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: seen[module].append(inputs[0].flatten(0, -2)))
        for module in seen
    ]
    for part in tokens.split(16):
        model(part)
    for hook in hooks:
        hook.remove()
    x, h = (torch.cat(parts) for parts in seen.values())
    return x, h


def _gaps(results: list[dict[str, Any]], arm: str, strength: float, key: str = "loss") -> list[float | None]:
    """A loss over that of BF16 from the same start, by seed; None where a run did not finish."""
    of = {(row["arm"], row["seed"]): row[key] for row in results if row["strength"] == strength}
    seeds = sorted(seed for name, seed in of if name == arm and (BASELINE, seed) in of)
    pairs = [(of[arm, seed], of[BASELINE, seed]) for seed in seeds]
    return [None if None in pair else pair[0] - pair[1] for pair in pairs]


def _finite(gaps: list[float | None]) -> list[float]:
    return [gap for gap in gaps if gap is not None]


def _shown(gaps: list[float | None]) -> str:
    """The mean, and half the width of its 95% interval over seeds."""
    finite = _finite(gaps)
    lost = f"{len(gaps) - len(finite)} of {len(gaps)} diverged"
    if not finite:
        return lost
    half = f" ± {stats.t.ppf(0.975, len(finite) - 1) * stats.sem(finite):.3f}" if len(finite) > 1 else ""
    return f"{round(statistics.mean(finite), 3) + 0.0:+.3f}{half}" + (f", {lost}" if len(finite) < len(gaps) else "")


def _loses_from(results: list[dict[str, Any]], arm: str, key: str) -> str:
    """The least strength from which on, at every strength above, too, no seed's gap is below MARGIN."""
    found = None
    for strength in sorted({row["strength"] for row in results}, reverse=True):
        gaps = _gaps(results, arm, strength, key)
        if not gaps or any(gap is not None and gap <= MARGIN for gap in gaps):
            break
        found = strength
    return "never" if found is None else f"{found:g}"


def _table(results: list[dict[str, Any]]) -> str:
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in results) if arm != BASELINE]
    seeds = sorted({row["seed"] for row in results})
    lines = [
        f"Seeds {', '.join(map(str, seeds))}. Gaps to bf16 of the same start and seed, in nats a token: the mean and"
    ]
    lines += ["half the width of its 95% interval (Student's t, paired).", ""]
    for key, title in (("start_loss", "before training"), ("loss", "after training")):
        lines += [
            f"**{title}**",
            "",
            f"| strength | spread | lost | bf16 | {' | '.join(arms)} |",
            f"|{'---|' * (4 + len(arms))}",
        ]
        for strength in sorted({row["strength"] for row in results}):
            rows = [row for row in results if row["strength"] == strength]
            shown = [
                f"{strength:g}",
                *(f"{statistics.mean(row[name] for row in rows):.3g}" for name in ("spread", "lost")),
            ]
            base = [row[key] for row in rows if row["arm"] == BASELINE and row[key] is not None]
            shown.append(f"{statistics.mean(base):.3f}" if base else "-")
            shown += [_shown(_gaps(results, arm, strength, key)) for arm in arms]
            lines.append(f"| {' | '.join(shown)} |")
        least = [_loses_from(results, arm, key) for arm in arms]
        lines += [f"| every seed loses more than {MARGIN:g} from | | | | {' | '.join(least)} |", ""]
    return "\n".join(lines)


def _plot(results: list[dict[str, Any]], target: Path) -> None:
    figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    strengths = sorted({row["strength"] for row in results})
    panels = zip(figure.subplots(1, 2), (("start_loss", "before training"), ("loss", "after training")), strict=True)
    for axes, (key, title) in panels:
        for arm in dict.fromkeys(row["arm"] for row in results if row["arm"] != BASELINE):
            by_strength = {s: _finite(_gaps(results, arm, s, key)) for s in strengths}
            points = {s: gaps for s, gaps in by_strength.items() if gaps}
            (line,) = axes.plot(list(points), [statistics.mean(gaps) for gaps in points.values()], "o-", label=arm)
            for s, gaps in points.items():
                axes.plot([s] * len(gaps), gaps, ".", color=line.get_color(), alpha=0.5)
        axes.set_xscale("log", base=2)
        axes.set_yscale("symlog", linthresh=MARGIN)
        axes.set(title=title, xlabel="strength of the aligned rows", ylabel="loss over BF16 (nats per token)")
        axes.axhline(0.0, color="black", linewidth=0.5)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small", loc="upper left")
    figure.savefig(target, metadata={"Software": None})


if __name__ == "__main__":
    script_main(main, __doc__)
