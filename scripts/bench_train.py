"""One training shape in four trainers, interleaved: python scripts/bench_train.py [rounds=5] [steps=2] [compiled=1]

Vocabulary 8,192, hidden 256, FFN 704, 8 layers, 8 heads, 16 sequences of 512 tokens a step, BF16, AdamW, random tokens:
- ours: this trainer's own step;
- transformers loop: LlamaForCausalLM, BF16 autocast, fused AdamW, with eager and with SDPA attention;
- transformers compiled: the faster of the two under torch.compile (compiled=0 leaves it out);
- transformers Trainer: the same model under `Trainer`, logging off.

All run in this process, with the same threads and the same allocator. Prints the median tokens/s over rounds, the ratio
to the best bare loop, and the share of the rate of a 2048^3 BF16 matrix product timed in the same rounds.
"""

import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import transformers
from narrowgauge.models import LlamaConfig
from narrowgauge.trainer import distributed
from narrowgauge.trainer.build import build_state, num_parameters
from narrowgauge.trainer.cli import script_main
from narrowgauge.trainer.config import load_config
from narrowgauge.trainer.data.batches import Batch
from narrowgauge.trainer.distributed import World
from narrowgauge.trainer.errors import UserError
from narrowgauge.trainer.state import TrainState
from narrowgauge.trainer.step import StepResult, update_from
from torch import Tensor

VOCAB, HIDDEN, FFN, LAYERS, HEADS, POSITIONS, SEQUENCES = 8192, 256, 704, 8, 8, 512, 16
TOKENS = POSITIONS * SEQUENCES


class RandomSource:
    """Batches of random tokens."""

    num_micro = 1

    def first_sample(self, step: int) -> int:
        return step * SEQUENCES

    def batch(self, step: int, micro: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCAB, (SEQUENCES, POSITIONS + 1), generator=generator)
        return Batch(tokens, torch.ones(SEQUENCES, POSITIONS), self.first_sample(step))


def hf_model(attention: str) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation=attention,
    )
    return transformers.LlamaForCausalLM(config)


def hf_step(model: transformers.PreTrainedModel, call: Callable[..., object]) -> Callable[[int], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    source = RandomSource()

    def step(number: int) -> None:
        tokens: Tensor = source.batch(number, 0).tokens[:, :-1]
        with torch.autocast("cpu", torch.bfloat16):
            loss = call(input_ids=tokens, labels=tokens).loss  # type: ignore[attr-defined]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def hf_trainer(attention: str, steps: int) -> Callable[[int], None]:
    """A round of ``steps`` steps under `Trainer`; its own start-up is not timed."""
    source = RandomSource()
    rows = torch.cat([source.batch(number, 0).tokens[:, :-1] for number in range(steps)])
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    stamps: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *arguments: object, **more: object) -> None:
            stamps.append(time.perf_counter())

        def on_step_end(self, *arguments: object, **more: object) -> None:
            stamps.append(time.perf_counter())

    scratch = tempfile.mkdtemp(prefix="bench_train_")
    arguments = transformers.TrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=SEQUENCES,
        max_steps=steps,
        bf16=True,
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        optim="adamw_torch_fused",
    )
    model = hf_model(attention)

    def run(number: int) -> None:
        stamps.clear()
        transformers.Trainer(model, arguments, train_dataset=dataset, callbacks=[Clock()]).train()
        run.seconds = sum(stamps[1::2]) - sum(stamps[::2])  # type: ignore[attr-defined]

    return run


def our_training() -> tuple[Callable[[int], StepResult], TrainState, World]:
    config = load_config(["precision=bf16"])
    world = distributed.start(config.parallel)
    model = LlamaConfig(
        name="bench",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        tie_embeddings=True,
    )
    state = build_state(model, config.values.precision, config.parallel, config.optim, world, seed=0)
    source = RandomSource()
    return lambda number: update_from(state, source, world, config.optim, number, 1000), state, world


def main(overrides: list[str], *, rounds: int = 5, steps: int = 2, compiled: int = 1) -> None:
    if overrides:
        raise UserError(f"unknown argument {overrides[0]!r}; --help shows the ones there are")
    ours, state, _ = our_training()  # first: it sets the threads and the allocator for all
    parameters = num_parameters(state.model)
    models = {name: hf_model(name) for name in ("eager", "sdpa")}
    ways: dict[str, Callable[[int], object]] = {"ours": ours}
    ways |= {f"transformers loop, {name}": hf_step(model, model) for name, model in models.items()}
    times: dict[str, list[float]] = {}
    number = 0

    def turn(name: str, way: Callable[[int], object], count: int, keep: bool) -> None:
        nonlocal number
        started = time.perf_counter()
        for _ in range(count):
            number += 1
            way(number)
        seconds = getattr(way, "seconds", time.perf_counter() - started)
        if keep:
            times.setdefault(name, []).append(seconds)

    for name, way in ways.items():
        turn(name, way, 2, keep=False)
    trial = {name: _seconds(ways[f"transformers loop, {name}"]) for name in models}
    best = min(trial, key=trial.__getitem__)
    if compiled:
        model = hf_model(best)
        ways["transformers compiled"] = hf_step(model, torch.compile(model))
        turn("transformers compiled", ways["transformers compiled"], 3, keep=False)
    trainer = hf_trainer(best, steps)
    a, b = torch.randn(2, 2048, 2048).bfloat16().unbind()
    for _ in range(rounds):
        for name, way in ways.items():
            turn(name, way, steps, keep=True)
        turn("transformers Trainer", trainer, 1, keep=True)
        for _ in range(3):
            turn("matrix product", lambda _: a @ b, 1, keep=True)

    rate = 2 * 2048**3 / statistics.median(times.pop("matrix product"))
    # 6 operations a parameter and token, and 12 a position of causal attention (half of them masked).
    operations = TOKENS * (6 * parameters + 6 * LAYERS * HIDDEN * POSITIONS)
    medians = {name: statistics.median(values) / steps for name, values in times.items()}
    loop = min(value for name, value in medians.items() if "loop" in name)
    print(f"{torch.get_num_threads()} threads; 2048^3 BF16 matrix product: {rate / 1e9:.0f} GFLOP/s; {rounds} rounds")
    print(f"{'':26} {'tokens/s':>9} {'median s':>9} {'min s':>7} {'times the loop':>15} {'of the product':>15}")
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        share = operations / median / rate
        least = min(times[name]) / steps
        print(f"{name:26} {TOKENS / median:9.0f} {median:9.3f} {least:7.3f} {loop / median:15.2f} {share:15.0%}")
    distributed.finish()


def _seconds(way: Callable[[int], object]) -> float:
    started = time.perf_counter()
    way(0)
    return time.perf_counter() - started


if __name__ == "__main__":
    script_main(main, __doc__)
