"""The page of interactive sessions, as a person uses it: the real daemon in a process of its own, a real browser before it."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from support.browser import CHROMIUM, Tab, disagreement, expect, pixels, sync_api, tab
from support.daemons import DaemonProcess, environment, running
from support.database import Database

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium, chromium-browser or google-chrome in PATH")

PHOTO = Path(__file__).resolve().parents[2] / "daemon" / "photos" / "chelsea.jpg"
SIZE_WH = (451, 300)
CAT = (200, 180)
CHEEK = (170, 210)
BOX = (40, 5, 400, 295)
BLUE = [47, 123, 255]
BYTES_MAX = 2_000_000
SECRET = "a key that no page may hold"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One headless Chromium for all tests here."""
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def daemon(module_database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon with the page, on the engine that needs no weights."""
    folder = tmp_path_factory.mktemp("page")
    with running(settings(module_database, folder), folder) as started:
        yield started


@pytest.fixture(scope="module")
def address(daemon: DaemonProcess) -> str:
    return f"http://127.0.0.1:{daemon.port}/"


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Tab]:
    """The page, before a photo was chosen."""
    with tab(browser, address, SIZE_WH, viewport={"width": 1024, "height": 700}) as made:
        yield made


@pytest.fixture
def ready(opened: Tab) -> Tab:
    """The page with the photo of the cat, which the server has looked at."""
    opened.upload(PHOTO)
    return opened


def settings(database: Database, folder: Path, **more: str) -> dict[str, str]:
    values = {"MASKD_PAGE": "true", "MASKD_VISUAL": "classical", "MASKD_EVERYTHING": "classical"}
    return environment(database.dsn, folder, MASKD_SESSION_BYTES_MAX=str(BYTES_MAX), **values, **more)


def test_a_photo_is_shown_at_once_and_then_has_a_session(opened: Tab, address: str) -> None:
    session = opened.upload(PHOTO)
    shown = "photo => photo.decode().then(() => [photo.naturalWidth, photo.naturalHeight])"
    assert opened.show("photo").evaluate(shown) == [*SIZE_WH]
    expect(opened.show("stage")).to_be_visible()
    expect(opened.show("status")).to_contain_text("Ready")
    expect(opened.show("engine")).to_have_text("classical")
    expect(opened.show("left")).to_contain_text("min more")
    known = httpx.get(f"{address}session/{session}").json()
    assert (known["width"], known["height"]) == SIZE_WH


def test_a_click_on_the_cat_draws_the_mask_that_the_server_answered(ready: Tab) -> None:
    with ready.answer() as answer:
        ready.click(*CAT)
    assert answer["asked"]["points"] == [{"x": CAT[0], "y": CAT[1], "label": 1}]
    assert pixels(answer["masks"][0])[CAT[1], CAT[0]]
    assert disagreement(ready.drawn(), answer["masks"][0]) < 0.001
    red, green, blue, opacity = ready.colour(*CHEEK)
    assert np.abs(np.array([red, green, blue]) - BLUE).max() < 6
    assert 80 < opacity < 160
    assert ready.colour(430, 280)[3] == 0
    expect(ready.show("time")).to_have_text(re.compile(r"^[\d.,]+ m?s$"))
    expect(ready.show("score")).to_have_text(f"{answer['masks'][0]['score']:.2f}")
    expect(ready.show("area")).to_have_text(f"{answer['masks'][0]['area']:,} px")


def test_a_right_click_takes_its_place_out_of_the_mask(ready: Tab) -> None:
    with ready.answer():
        ready.click(*CAT)
    assert ready.colour(*CHEEK)[3] > 0
    with ready.answer() as answer:
        ready.click(*CHEEK, button="right")
    assert [point["label"] for point in answer["asked"]["points"]] == [1, 0]
    assert not pixels(answer["masks"][0])[CHEEK[1], CHEEK[0]]
    assert disagreement(ready.drawn(), answer["masks"][0]) < 0.001
    expect(ready.page.locator("#marks .no")).to_have_count(1)


def test_a_drag_asks_with_a_box(ready: Tab) -> None:
    with ready.answer() as answer:
        ready.drag(*BOX)
    assert np.abs(np.array(answer["asked"]["box"]) - BOX).max() <= 2
    assert "points" not in answer["asked"]
    assert disagreement(ready.drawn(), answer["masks"][0]) < 0.001


def test_undo_shows_the_mask_before_without_asking_and_clear_shows_none(ready: Tab) -> None:
    with ready.answer() as first:
        ready.click(*CAT)
    with ready.answer():
        ready.drag(*BOX)
    asked: list[str] = []
    ready.page.on("request", lambda request: asked.append(request.url))
    ready.page.keyboard.press("Control+z")
    expect(ready.show("area")).to_have_text(f"{first['masks'][0]['area']:,} px")
    assert disagreement(ready.drawn(), first["masks"][0]) < 0.001
    ready.page.keyboard.press("Escape")
    expect(ready.show("status")).to_contain_text("Cleared")
    assert not ready.drawn().any()
    ready.show("undo").click()
    assert disagreement(ready.drawn(), first["masks"][0]) < 0.001
    assert asked == []


def test_the_other_answers_to_a_click_can_be_seen_and_gone_on_from(ready: Tab) -> None:
    with ready.answer() as answer:
        ready.click(*CAT)
    assert len(answer["masks"]) == 3
    ready.show("next").click()
    expect(ready.show("place")).to_have_text("answer 2 of 3")
    assert disagreement(ready.drawn(), answer["masks"][1]) < 0.001
    with ready.answer() as refined:
        ready.click(260, 60)
    assert refined["asked"]["mask"] == answer["masks"][1]["mask_ref"]


def test_a_photo_is_chosen_pointed_at_and_boxed_by_keyboard_alone(opened: Tab) -> None:
    keyboard = opened.page.keyboard
    opened.page.on("filechooser", lambda chooser: chooser.set_files(PHOTO))
    keyboard.press("Tab")
    expect(opened.show("choose")).to_be_focused()
    keyboard.press("Enter")
    opened.session()
    expect(opened.show("stage")).to_be_focused()
    for _ in range(4):
        keyboard.press("ArrowDown")
    expect(opened.page.locator("#marks .cross.over")).to_be_visible()
    with opened.answer() as clicked:
        keyboard.press("Enter")
    (point,) = clicked["asked"]["points"]
    assert point["x"] == SIZE_WH[0] // 2
    assert point["y"] > SIZE_WH[1] // 2
    for _ in range(8):
        keyboard.press("ArrowLeft")
    with opened.answer() as left_out:
        keyboard.press("Shift+Enter")
    assert [point["label"] for point in left_out["asked"]["points"]] == [1, 0]
    keyboard.press("Escape")
    expect(opened.show("status")).to_contain_text("Cleared")
    keyboard.press("b")
    for _ in range(20):
        keyboard.press("ArrowUp")
        keyboard.press("ArrowRight")
    with opened.answer() as boxed:
        keyboard.press("b")
    x0, y0, x1, y1 = boxed["asked"]["box"]
    assert 0 <= x0 < x1 <= SIZE_WH[0]
    assert 0 <= y0 < y1 <= SIZE_WH[1]


def test_of_fast_clicks_the_newest_answer_is_shown(ready: Tab) -> None:
    places = [(200, 180), (170, 210), (140, 100), (260, 60), (300, 220)]
    wanted = len(places)

    def newest(response: Any) -> bool:
        return response.url.endswith("/predict") and len(response.request.post_data_json["points"]) == wanted

    with ready.page.expect_response(newest) as waiting:
        for place in places:
            ready.click(*place)
    answer = waiting.value.json()
    expect(ready.show("area")).to_have_text(f"{answer['masks'][0]['area']:,} px")
    expect(ready.show("problem")).to_be_hidden()
    assert disagreement(ready.drawn(), answer["masks"][0]) < 0.001


def test_everything_highlights_what_is_under_the_pointer_and_a_click_chooses_it(ready: Tab) -> None:
    ready.show("everything").click()
    expect(ready.show("everything")).to_have_attribute("aria-pressed", "true")
    expect(ready.show("status")).to_contain_text("masks found")
    with ready.page.expect_response(lambda response: "/mask?" in response.url) as waiting:
        ready.page.mouse.move(*ready.place(*CAT))
    mask = waiting.value.json()["mask"]
    expect(ready.show("area")).to_have_text("–")
    ready.click(*CAT)
    expect(ready.show("area")).to_have_text(f"{mask['area']:,} px")
    assert disagreement(ready.drawn(), mask) < 0.001


def test_the_mask_and_the_cutout_are_downloaded_as_large_as_the_photo(ready: Tab) -> None:
    with ready.answer() as answer:
        ready.click(*CAT)
    mask_hw = pixels(answer["masks"][0])
    with ready.page.expect_download() as waiting:
        ready.show("save-mask").click()
    assert waiting.value.suggested_filename == "chelsea-mask.png"
    with Image.open(waiting.value.path()) as image:
        assert np.array_equal(np.asarray(image.convert("L")) > 127, mask_hw)
    with ready.page.expect_download() as waiting:
        ready.show("save-cutout").click()
    x0, y0, x1, y1 = (round(value) for value in answer["masks"][0]["box"])
    with Image.open(waiting.value.path()) as image:
        assert np.array_equal(np.asarray(image)[..., 3] > 127, mask_hw[y0:y1, x0:x1])


def test_a_session_that_expired_is_opened_again_without_a_word(ready: Tab, address: str) -> None:
    before = ready.session()
    assert httpx.delete(f"{address}session/{before}").status_code == 204
    with ready.answer() as found:
        ready.click(*CAT)
    assert ready.session(other_than=before) != before
    expect(ready.show("problem")).to_be_hidden()
    assert disagreement(ready.drawn(), found["masks"][0]) < 0.001


def test_a_file_that_is_too_large_is_refused_in_words_before_it_is_sent(opened: Tab, tmp_path: Path) -> None:
    large = tmp_path / "large.jpg"
    with large.open("wb") as file:
        file.truncate(20_000_001)
    asked: list[str] = []
    opened.page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/session") else None)
    opened.page.set_input_files("#file", large)
    expect(opened.show("problem")).to_contain_text("“large.jpg” is too large")
    expect(opened.show("choose")).to_be_visible()
    assert asked == []


def test_a_file_over_the_servers_own_limit_is_refused_in_words(opened: Tab) -> None:
    large = PHOTO.read_bytes() + bytes(3 * BYTES_MAX)
    opened.page.set_input_files("#file", {"name": "large.jpg", "mimeType": "image/jpeg", "buffer": large})
    expect(opened.show("problem")).to_contain_text("too large for the server")
    expect(opened.show("choose")).to_be_focused()


def test_a_file_that_is_no_image_is_refused_in_words(opened: Tab) -> None:
    opened.page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no photo at all"})
    expect(opened.show("problem")).to_contain_text("not a photo")
    expect(opened.show("choose")).to_be_visible()
    opened.upload(PHOTO)
    expect(opened.show("problem")).to_be_hidden()


def test_an_upload_that_fails_says_why_and_can_be_tried_again(opened: Tab) -> None:
    failures: list[tuple[int, str, str]] = [
        (429, "sessions_full", "The server is full"),
        (500, "internal", "went wrong on the server"),
        (0, "", "cannot be reached"),
    ]

    def fail(route: Any) -> None:
        if not failures:
            route.continue_()
        elif failures[0][0] == 0:
            route.abort()
        else:
            route.fulfill(status=failures[0][0], json={"error": {"code": failures[0][1], "message": "", "request_id": "0"}})

    opened.page.route("**/session", fail)
    while failures:
        opened.page.set_input_files("#file", PHOTO)
        expect(opened.show("problem")).to_contain_text(failures[0][2])
        failures.pop(0)
    opened.show("retry").click()
    opened.session()
    expect(opened.show("problem")).to_be_hidden()


def test_a_server_that_is_starting_is_asked_again_by_itself(opened: Tab) -> None:
    times = iter((503,))

    def start(route: Any) -> None:
        if next(times, None):
            route.fulfill(status=503, headers={"Retry-After": "0.1"}, json={"error": {"code": "starting"}})
        else:
            route.continue_()

    opened.page.route("**/session", start)
    opened.upload(PHOTO)
    expect(opened.show("problem")).to_be_hidden()


def test_a_photo_can_be_dropped_or_pasted(opened: Tab) -> None:
    give = """([event, bytes]) => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], "cat.jpg", { type: "image/jpeg" }));
      const options = { bubbles: true, cancelable: true };
      if (event === "drop") document.body.dispatchEvent(new DragEvent("drop", { ...options, dataTransfer: data }));
      else document.body.dispatchEvent(new ClipboardEvent("paste", { ...options, clipboardData: data }));
    }"""
    opened.page.evaluate(give, ["drop", list(PHOTO.read_bytes())])
    first = opened.session()
    expect(opened.show("file-name")).to_have_text("cat.jpg, 451 × 300")
    opened.page.evaluate(give, ["paste", list(PHOTO.read_bytes())])
    assert opened.session(other_than=first) != first


def test_in_the_dark_the_page_is_dark_and_without_motion_nothing_moves(browser: Any, address: str) -> None:
    with tab(browser, address, SIZE_WH, color_scheme="dark", reduced_motion="reduce") as dark:
        assert dark.page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor") == "rgb(15, 17, 21)"
        assert dark.show("choose").evaluate("button => getComputedStyle(button).transitionDuration") == "0s"


def test_on_a_phone_a_tap_adds_and_a_long_touch_takes_away(browser: Any, address: str) -> None:
    phone = {"viewport": {"width": 390, "height": 780}, "device_scale_factor": 3, "has_touch": True, "is_mobile": True}
    with tab(browser, address, SIZE_WH, **phone) as held:
        held.upload(PHOTO)
        with held.answer() as tapped:
            held.page.touchscreen.tap(*held.place(*CAT))
        assert disagreement(held.drawn(), tapped["masks"][0], reach=12) < 0.001
        x, y = held.place(*CHEEK)
        fingers = held.page.context.new_cdp_session(held.page)
        with held.answer() as kept:
            fingers.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
            expect(held.page.locator("#marks .no")).to_have_count(1)
            fingers.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        assert [point["label"] for point in kept["asked"]["points"]] == [1, 0]
        wide = held.page.evaluate("() => document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, "the page is wider than the phone"


def test_with_a_key_on_the_server_the_page_asks_for_a_ticket_and_keeps_it_out_of_the_address(
    browser: Any, module_database: Database, tmp_path: Path
) -> None:
    expiry = str(int(time.time()) + 600)
    ticket = f"{expiry}.{hmac.new(SECRET.encode(), expiry.encode(), hashlib.sha256).hexdigest()}"
    with running(settings(module_database, tmp_path, API_SECRET_KEY=SECRET), tmp_path) as locked:
        at = f"http://127.0.0.1:{locked.port}/"
        with tab(browser, at, SIZE_WH) as asked:
            asked.page.set_input_files("#file", PHOTO)
            expect(asked.show("ticket-text")).to_be_focused()
            asked.show("ticket-text").fill("0.no")
            asked.page.keyboard.press("Enter")
            expect(asked.show("problem")).to_contain_text("ticket")
            asked.show("ticket-text").fill(ticket)
            asked.page.keyboard.press("Enter")
            asked.session()
            expect(asked.show("problem")).to_be_hidden()
        with tab(browser, f"{at}#ticket={ticket}", SIZE_WH) as given:
            assert given.page.url == at
            with given.answer():
                given.upload(PHOTO)
                given.click(*CAT)
        assert ticket not in locked.log.read_text()
