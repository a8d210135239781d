"""Text from a run: python scripts/generate.py run.dir=runs/sample prompt="The people"

[tokens=120] [temperature=0.8, 0 = the likeliest] [top_k=50, 0 = all] [seed=0]
[precision.recipe=FILE.py, of a run that was trained with a recipe file]

Uses the newest complete checkpoint of the run directory.
"""

import sys

from narrowgauge.trainer import distributed
from narrowgauge.trainer.cli import recipe_files_of, run_dir_of, script_main
from narrowgauge.trainer.errors import UserError
from narrowgauge.trainer.tools.generate import SampleConfig, generate
from narrowgauge.trainer.tools.restore import restore_run


def main(
    overrides: list[str],
    *,
    prompt: str = "The",
    tokens: int = 120,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> None:
    sample = SampleConfig(prompt=prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed)
    try:
        sample.validate()
    except ValueError as error:
        raise UserError(str(error).removeprefix("sample.")) from error
    run = restore_run(run_dir_of(overrides), recipe_files_of(overrides))
    context = run.config.data.seq_len
    if (length := len(run.tokenizer.encode_batch([prompt])[0])) > context:
        print(f"warning: of the prompt's {length} tokens the last {context} are seen", file=sys.stderr)
    print(generate(run.state.model, run.tokenizer, sample, context=context, device=run.world.device))
    distributed.finish()


if __name__ == "__main__":
    script_main(main, __doc__)
