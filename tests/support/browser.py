"""The page of interactive sessions in a real browser: what a person does with a photo, and what is then seen.

Everything here is driven by Playwright's synchronous interface and waits by `expect`, never for time.
"""

from __future__ import annotations

import io
import re
import shutil
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from pycocotools import mask as coco

sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
expect = sync_api.expect
BINARIES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for found in map(shutil.which, BINARIES) if found), None)

PICTURE = "() => document.querySelector('#mask').toDataURL('image/png').split(',')[1]"
PIXEL = """([x, y]) => {
  const canvas = document.querySelector("#mask");
  return [...canvas.getContext("2d").getImageData(x * canvas.width, y * canvas.height, 1, 1).data];
}"""


@dataclass(slots=True, eq=False)
class Tab:
    """One open page; `errors` are what scripts threw, `hosts` whom it asked for anything."""

    page: Any
    size_wh: tuple[int, int]
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def show(self, id_: str) -> Any:
        """The element of that id."""
        return self.page.locator(f"#{id_}")

    def upload(self, file: Any) -> str:
        """Choose a photo; the id of its session."""
        self.page.set_input_files("#file", file)
        return self.session()

    def session(self, other_than: str | None = None) -> str:
        """The id of the session, once there is one (other than the one before)."""
        expect(self.show("session")).to_have_text(re.compile(r"^[0-9a-f-]{36}$"))
        if other_than is not None:
            expect(self.show("session")).not_to_have_text(other_than)
        return str(self.show("session").text_content())

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a pixel of the photo is on the screen."""
        box = self.show("stage").bounding_box()
        return box["x"] + (x + 0.5) / self.size_wh[0] * box["width"], box["y"] + (y + 0.5) / self.size_wh[1] * box["height"]

    def click(self, x: float, y: float, button: str = "left") -> None:
        self.page.mouse.click(*self.place(x, y), button=button)

    def drag(self, x0: float, y0: float, x1: float, y1: float) -> None:
        self.page.mouse.move(*self.place(x0, y0))
        self.page.mouse.down()
        self.page.mouse.move(*self.place((x0 + x1) / 2, (y0 + y1) / 2))
        self.page.mouse.move(*self.place(x1, y1))
        self.page.mouse.up()

    @contextmanager
    def answer(self) -> Iterator[dict[str, Any]]:
        """What the server answers to the prompt that is made inside; filled in, and drawn, at the end."""
        found: dict[str, Any] = {}
        with self.page.expect_response(lambda response: response.url.endswith("/predict") and response.ok) as waiting:
            yield found
        found.update(waiting.value.json(), asked=waiting.value.request.post_data_json)
        expect(self.show("status")).to_contain_text("pixels" if found["masks"] else "Nothing")

    def drawn(self) -> npt.NDArray[np.uint8]:
        """The opacity of the canvas that lies over the photo, (height, width) in pixels of the screen."""
        with Image.open(io.BytesIO(b64decode(self.page.evaluate(PICTURE)))) as image:
            return np.asarray(image.convert("RGBA"))[..., 3]

    def colour(self, x: float, y: float) -> list[int]:
        """Red, green, blue and opacity of the canvas over a pixel of the photo."""
        found: list[int] = self.page.evaluate(PIXEL, [(x + 0.5) / self.size_wh[0], (y + 0.5) / self.size_wh[1]])
        return found


@contextmanager
def tab(browser: Any, address: str, size_wh: tuple[int, int], **options: Any) -> Iterator[Tab]:
    """A page of its own at `address`; AssertionError at the end when a script threw or another host was asked."""
    context = browser.new_context(**options)
    context.set_default_timeout(15_000)
    opened = Tab(context.new_page(), size_wh)
    opened.page.on("pageerror", lambda error: opened.errors.append(str(error)))
    opened.page.on("console", lambda line: opened.errors.append(line.text) if "Content Security" in line.text else None)
    opened.page.on("request", lambda request: opened.hosts.add(request.url.split("/")[2] if "//" in request.url else ""))
    try:
        opened.page.goto(address)
        yield opened
    finally:
        context.close()
    assert not opened.errors
    assert opened.hosts - {""} <= {address.split("/")[2]}


def pixels(mask: dict[str, Any]) -> npt.NDArray[np.bool_]:
    """A mask of an answer, (height, width) of the photo."""
    found: npt.NDArray[np.bool_] = coco.decode(mask["rle"]) > 0
    return found


def disagreement(drawn_hw: npt.NDArray[np.uint8], mask: dict[str, Any], reach: int = 6) -> float:
    """Share of the screen's pixels that are drawn unlike a mask of an answer, but for `reach` pixels along its edge."""
    mask_hw = pixels(mask)
    rows = ((np.arange(drawn_hw.shape[0]) + 0.5) * mask_hw.shape[0] / drawn_hw.shape[0]).astype(int)
    columns = ((np.arange(drawn_hw.shape[1]) + 0.5) * mask_hw.shape[1] / drawn_hw.shape[1]).astype(int)
    wanted = mask_hw[np.ix_(rows, columns)]
    sums = np.pad(np.pad(wanted, reach, mode="edge").astype(np.int32).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    side = 2 * reach + 1
    around = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    clear = (around == 0) | (around == side * side)
    return float(((drawn_hw > 0) != wanted)[clear].mean())
