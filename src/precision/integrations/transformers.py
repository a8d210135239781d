"""Recipes under the ``Trainer`` of `transformers`:

>>> plan = apply("nvfp4", model)
>>> Trainer(model, arguments, train_dataset=data, callbacks=[PrecisionCallback(plan)]).train()

What is saved is a plain model: what a recipe remembers from step to step (``fp8_delayed``) is saved with it, in a file
of its own in every ``checkpoint-N``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..plan import Plan


class PrecisionCallback(TrainerCallback):
    """Tells a plan where training stands: the step, the global index of every micro-batch's first sample, its end.

    Rounding noise is a function of these, so it differs from step to step, and a run that goes on from a checkpoint has
    the noise it would have had. Evaluation rounds as the last step did and leaves no trace.

    Args:
        plan: of ``precision.apply``, on the model that the Trainer gets.
        resume_from: the checkpoint directory that ``train(resume_from_checkpoint=...)`` is given, where it is not
            ``args.resume_from_checkpoint`` or ``output_dir/checkpoint-N``: a callback does not learn it. Where nothing
            is found there, the amaxes are measured anew for a step, with a warning.
    """

    FILE = "precision_state.safetensors"

    def __init__(self, plan: Plan, resume_from: str | Path | None = None) -> None:
        self._plan = plan
        self._resume_from = resume_from
        self._micro = 0
        model: Any = plan.model
        if hasattr(model, "_keys_to_ignore_on_save"):
            model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *_state(plan)}
        if plan.differs_by_rank:  # or DDP would put rank 0's into all before every step
            ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
            model._ddp_params_and_buffers_to_ignore = {*ignored, *plan.buffers()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        if self._plan.recipe.one_micro_batch and args.gradient_accumulation_steps > 1:
            raise ValueError(
                f"the recipe's amax=step makes scales of the whole step, which has to be one micro-batch: "
                f"gradient_accumulation_steps={args.gradient_accumulation_steps} must be 1, or amax=micro"
            )
        methods = [name for name in ("loss_terms", "before_update", "after_update") if self._plan.wants(name)]
        if unserved := [*methods, *self._plan.hook_parameters()]:
            raise ValueError(f"the Trainer has no place for what the recipe's hooks have: {', '.join(unserved)}")
        tensors = _state(self._plan)
        if state.global_step == 0 or not tensors:
            return
        source = self._resume_from or args.resume_from_checkpoint
        place = Path(source) if isinstance(source, str | Path) else Path(args.output_dir or ".") / _directory(state)
        file = place / self._file(args)
        if not file.exists():
            logging.get_logger(__name__).warning(f"{file} is not there: the recipe measures its amaxes anew for a step")
            self._plan.forget()
            return
        # Earlier versions saved the model's own buffers here, too, which its checkpoint has.
        saved = {name: tensor for name, tensor in load_file(file).items() if name not in self._plan.of_model}
        ours, found = ({name: tensor.shape for name, tensor in some.items()} for some in (tensors, saved))
        if wrong := sorted(name for name in ours.keys() | found.keys() if ours.get(name) != found.get(name)):
            raise ValueError(f"{file} is of another recipe or model: {wrong[0]} differs, one of {len(wrong)}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(saved[name])

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._micro = 0
        self._plan.begin_step(state.global_step, self._first_sample(args, state), state.max_steps)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self._micro += 1
        self._plan.begin_micro(self._first_sample(args, state))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._plan.end_step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        tensors = _state(self._plan)
        if tensors and (self._plan.differs_by_rank or args.process_index == 0):
            place = Path(args.output_dir or ".") / _directory(state)
            place.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, place / self._file(args)
            )

    def _file(self, args: TrainingArguments) -> str:
        return f"rank{args.process_index}_{self.FILE}" if self._plan.differs_by_rank else self.FILE

    def _first_sample(self, args: TrainingArguments, state: TrainerState) -> int:
        """Of this rank's next micro-batch: batches are dealt to the ranks in turn."""
        micro = state.global_step * args.gradient_accumulation_steps + self._micro
        return int((micro * args.world_size + args.process_index) * args.train_batch_size)


def _directory(state: TrainerState) -> str:
    return f"checkpoint-{state.global_step}"


def _state(plan: Plan) -> dict[str, Tensor]:
    """What the recipe remembers on this rank, alive."""
    tensors = plan.state_tensors()
    return {name: tensor.to_local()[0] if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
