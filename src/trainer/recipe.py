"""The ``precision`` part of a config: which recipe, which files of a user may run, and the value it is parsed to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..precision.backends import require_backend
from ..precision.loading import content_of, files_in, is_file, load, renamed, sha256
from ..precision.recipe import NO_ARGUMENTS, Recipe, require_apart
from ..precision.states.driver import OptimizerBuilder
from ..precision.states.moments import Moments, chosen
from ..precision.states.rules import UpdateRule
from ..precision.states.updates import named_rule
from .errors import as_user_error


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What a model is computed in. The recipe's states are those of ``optim.moments``, where it says any, and its rule
    that of ``optim.update``.
    """

    recipe: Recipe
    own_moments: Moments  # the states that the recipe itself has
    own_update: UpdateRule | OptimizerBuilder  # and its rule
    backend: str


@dataclass(kw_only=True)
class PrecisionConfig:
    """Which recipe, with which arguments (its signature is their schema), on which backend; what changes by step."""

    name: str
    recipe: str
    args: dict[str, Any] = field(default_factory=dict)
    schedule: list[Any] = field(default_factory=list)  # of phases: steps, gemms, recipe, args (precision.recipe)
    backend: str = "auto"

    def parse(
        self,
        moments: Any,
        total_steps: int,
        *,
        update: str | None = None,
        update_args: Mapping[str, Any] = NO_ARGUMENTS,
    ) -> Precision:
        """With ``optim.moments``, ``update`` and ``update_args``, for a run of ``total_steps``. Runs recipe files.

        Raises ValueError for an unknown recipe, argument or backend, UserError for an unknown codec or update rule, and
        a schedule that cannot be.
        """
        recipe = load(self.recipe, self.args, self.schedule)
        require_backend(self.backend)
        rule = recipe.update
        with as_user_error("optim.update: ", ValueError):
            if update is not None:
                rule = named_rule(update, update_args)
            elif update_args:
                raise ValueError(f"update_args={dict(update_args)} are settings of a rule, and optim.update names none")
        with as_user_error("optim.moments: ", ValueError):
            states = chosen(moments, recipe.moments, rule)
        with as_user_error("precision.", ValueError):
            require_apart(recipe.schedule, total_steps)
        return Precision(
            recipe=replace(recipe, moments=states, update=rule),
            own_moments=recipe.moments,
            own_update=recipe.update,
            backend=self.backend,
        )

    def files(self) -> list[str]:
        """The users' recipe files that this config names, its own first."""
        return list(dict.fromkeys(files_in([{"": part} for part in (self.recipe, self.args, self.schedule)])))

    def require_said(self, said: Collection[str]) -> None:
        """Raises ValueError for a recipe file that the command line, which says ``said``, does not name."""
        for key in ("recipe", "args", "schedule"):
            for file in files_in([{"": getattr(self, key)}]):
                if file not in said:
                    way = f"says precision.recipe={file}" if key == "recipe" else f"names it in precision.{key}"
                    raise ValueError(
                        f"precision.{key} names the recipe file {file} (sha256 {sha256(file)}): it is Python, and runs "
                        f"only if the command line {way}"
                    )

    def identity(self) -> dict[str, Any]:
        """What a checkpoint says of the recipe that its tensors are of: files by what they hold."""
        parts = {"name": self.recipe, "args": self.args} | ({"schedule": self.schedule} if self.schedule else {})
        return {key: renamed(value, content_of) for key, value in parts.items()}

    def restored(self, identity: Mapping[str, Any], said: Collection[str]) -> PrecisionConfig:
        """With the recipe of a checkpoint. A file of it is that of ``said`` which holds the same.

        Raises ValueError if there is none, naming what it holds.
        """
        there = {content_of(file): file for file in said if is_file(file)}

        def placed(file: str) -> str:
            if file not in there:
                held = file.removesuffix(".py").replace(":", " ")
                raise ValueError(f"a recipe file ({held}), which is Python and runs only if the command line names it")
            return there[file]

        recipe, args, schedule = (
            renamed(part, placed) for part in (identity["name"], identity["args"], identity.get("schedule", []))
        )
        return replace(self, recipe=recipe, args=args, schedule=schedule)
