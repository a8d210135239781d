"""Number formats and precision recipes for pretraining: for any tree of ``nn.Linear``, under any trainer.

>>> plan = apply("mxfp8", model)  # or apply(load("mxfp8", {"keep_last": 1}), model); available() names the recipes
>>> print(plan)  # what computes in what, and how much of the model is quantized
>>> for step, batch in enumerate(batches):
...     plan.begin_step(step, step * len(batch))
...     model(batch).loss.backward()
...     plan.end_step()
...     optimizer.step()
...     optimizer.zero_grad()

Under the ``Trainer`` of `transformers` a ``PrecisionCallback(plan)`` tells the plan of the steps.
"""

from typing import TYPE_CHECKING, Any

from .apply import apply
from .loading import available, load
from .plan import Plan
from .recipe import Recipe

if TYPE_CHECKING:
    from .integrations.transformers import PrecisionCallback

__all__ = ["Plan", "PrecisionCallback", "Recipe", "apply", "available", "load"]


def __getattr__(name: str) -> Any:
    if name == "PrecisionCallback":
        from .integrations.transformers import PrecisionCallback  # `transformers` takes seconds to import

        return PrecisionCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "PrecisionCallback"]
