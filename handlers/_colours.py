"""Colours as a row writes them: "#FF0000", or "#F00" for short.

Enters: a JSON value. Leaves: RGB, or one sentence that shows the form.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

RGB = tuple[int, int, int]
_HEX = re.compile(r"#(?:[0-9a-f]{3}){1,2}", re.IGNORECASE)


def _rgb(value: Any) -> Any:
    if isinstance(value, str) and _HEX.fullmatch(value):
        digits = value[1:] if len(value) == 7 else "".join(2 * digit for digit in value[1:])
        return tuple(bytes.fromhex(digits))
    shown = str(value)
    what = f'a colour is written "#FF0000" or "#F00", not "{shown if len(shown) <= 40 else shown[:40] + "…"}"'
    raise PydanticCustomError("colour", "{what}", {"what": what})


Colour = Annotated[RGB, BeforeValidator(_rgb)]


def hex_of(colour: RGB) -> str:
    """The colour as labels have it: "#FF0000"."""
    return "#{:02X}{:02X}{:02X}".format(*colour)
