"""A run as a `transformers` checkpoint: python scripts/export_hf.py run.dir=runs/a out=hf/ [dtype=float32] [fold=false]

Writes config.json, model.safetensors and the tokenizer of the newest complete checkpoint; AutoModelForCausalLM and
AutoTokenizer of `transformers` 4.57 or later load it offline. The length it was trained at is the longest it says it
takes; where positions are learned, lm_eval must be told, as the last line does. The master weights are written (dtype:
float32 or bfloat16): a narrow recipe's rounding is not in the file. fold=true (Llama) takes the scales of
Smooth-SwiGLU's channels, as powers of two, into up_proj's rows and down_proj's columns: the same logits, from channels
of like size, for who casts them to FP8 afterwards.
"""

from pathlib import Path

from narrowgauge.trainer.cli import recipe_files_of, run_dir_of, script_main
from narrowgauge.trainer.errors import UserError
from narrowgauge.trainer.pretrained import PretrainedDirectory
from narrowgauge.trainer.tools.export import export_run


def main(overrides: list[str], *, out: str = "", dtype: str = "float32", fold: str = "false") -> None:
    run_dir = run_dir_of(overrides)
    if not out:
        raise UserError("out=... is missing: the directory to write")
    if fold not in ("true", "false"):
        raise UserError(f"fold={fold}: true or false")
    step = export_run(run_dir, Path(out), dtype, folded=fold == "true", said=recipe_files_of(overrides))
    length = PretrainedDirectory(out).trained_length
    print(f"step {step} of {run_dir} is in {out}, master weights in {dtype}, trained on {length} tokens at a time")
    print(f"lm_eval --model hf --model_args pretrained={out},dtype={dtype},max_length={length} ...")


if __name__ == "__main__":
    script_main(main, __doc__)
