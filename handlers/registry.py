"""Which kinds exist: the modules of this package whose names begin with a letter, `base` and this one apart.

Enters: nothing but the package's own file names. Leaves: kind -> module. It must never import a package that only a model needs.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import cast

import handlers
from handlers.base import Handler
from models.base import Role

NOT_KINDS = frozenset({"base", "registry"})
STAGES = ("parse", "inputs", "prepare", "run", "finish")


def discover() -> dict[str, Handler]:
    """Every kind by name, in alphabetical order; raises TypeError with a sentence when a module lacks a name of `Handler`."""
    names = sorted(module.name for module in pkgutil.iter_modules(handlers.__path__))
    kinds = [name for name in names if not name.startswith("_") and name not in NOT_KINDS]
    return {kind: checked(importlib.import_module(f"handlers.{kind}")) for kind in kinds}


def checked(module: ModuleType) -> Handler:
    """The module as a handler; raises TypeError that names the file and what it lacks."""
    roles = getattr(module, "ROLES", None)
    batch_max = getattr(module, "BATCH_MAX", None)
    factor = getattr(module, "TIMEOUT_FACTOR", None)
    wrong = [name for name in STAGES if not callable(getattr(module, name, None))]
    if not isinstance(roles, frozenset) or not all(isinstance(role, Role) for role in roles):
        wrong.append("ROLES (a frozenset of Role)")
    if not isinstance(batch_max, int) or batch_max < 1:
        wrong.append("BATCH_MAX (an integer from 1)")
    if not isinstance(factor, int | float) or factor <= 0:
        wrong.append("TIMEOUT_FACTOR (a number above 0)")
    if wrong:
        raise TypeError(f"{module.__name__.replace('.', '/')}.py is not a handler: it lacks {', '.join(wrong)}")
    return cast(Handler, module)
