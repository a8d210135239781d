"""Loss, perplexity and bits per byte: python scripts/evaluate.py run.dir=runs/a   or   hf=DIRECTORY path=CORPUS

[path=a corpus in C4's layout; a run's own shards if not given] [split=validation] [tokens=0, the first ones; 0 = all]
[batch=8 sequences at once] [seq_len=0; 0 = the length it was trained at] [precision=bf16, for hf=]
[precision.recipe=FILE.py, of a run that was trained with a recipe file]
"""

from narrowgauge.trainer import distributed
from narrowgauge.trainer.cli import recipe_files_of, run_dir_of, script_main
from narrowgauge.trainer.data.corpus import SPLITS
from narrowgauge.trainer.errors import UserError
from narrowgauge.trainer.tools.evaluation import evaluate_on, open_pretrained, open_run


def main(
    overrides: list[str],
    *,
    hf: str = "",
    path: str = "",
    split: str = "validation",
    tokens: int = 0,
    batch: int = 8,
    seq_len: int = 0,
    precision: str = "",
) -> None:
    if split not in SPLITS:
        raise UserError(f"split={split}: one of {', '.join(SPLITS)}")
    for name, value, least in (("tokens", tokens, 0), ("batch", batch, 1), ("seq_len", seq_len, 0)):
        if value < least:
            raise UserError(f"{name}={value}: must be at least {least}")
    if hf and not path:
        raise UserError("hf=... needs path=...: a corpus in C4's layout")
    if hf and overrides:
        raise UserError(f"{overrides[0]}: not together with hf=..., whose own arguments --help shows")
    if precision and not hf:
        raise UserError(f"precision={precision} is for hf=...: a run is evaluated as it was trained")
    if hf:
        subject = open_pretrained(hf, precision or "bf16", seq_len or None)
    else:
        subject = open_run(run_dir_of(overrides), seq_len or None, recipe_files_of(overrides))
    result = evaluate_on(subject, path or None, split, tokens, batch)
    all_there = f", all there are of the {tokens:,} asked for" if result.tokens < tokens else ""
    windows = f"over {result.tokens:,} tokens of {split} in windows of {result.seq_len:,}{all_there}"
    print(f"loss           {result.loss:.6f} nats per token, {windows}")
    print(f"perplexity     {result.perplexity:.4f}")
    print(f"bits per byte  {result.bits_per_byte:.6f}")
    distributed.finish()


if __name__ == "__main__":
    script_main(main, __doc__)
