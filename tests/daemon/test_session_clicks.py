"""Clicks and everything mode by real HTTP: prompts in, masks of the original image out, in every form alike."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from support.checkpoints import engine as mobile_sam
from support.desk import Counter, a_store, counter
from support.engines import embedded, segmented
from support.photos import COFFEE_BOX, photo
from support.pictures import flag, saved

from daemon.lanes import Lane
from handlers._rle import segmentation
from models.base import Prompt, Role
from models.classical import Classical
from models.mock import Mock

pytestmark = pytest.mark.anyio
SIZE_WH = (1301, 833)
FLAG = saved(flag(*SIZE_WH), "PNG")


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def decoded(rle: dict[str, Any]) -> Any:
    return coco_mask.decode(rle).astype(bool)


def iou(a_hw: Any, b_hw: Any) -> float:
    return float((a_hw & b_hw).sum() / (a_hw | b_hw).sum())


async def test_masks_of_a_large_photo_are_those_a_task_gets_to_the_pixel() -> None:
    image_hwc = np.asarray(Image.fromarray(photo("coffee")).resize((1617, 1077), Image.Resampling.BICUBIC))
    model = mobile_sam()
    prompt = Prompt(((700.0, 500.0),), (1,))
    wanted = segmented(model, embedded(model, image_hwc), [prompt], multimask=True)[0]
    async with counter(model) as desk:
        session_id = await desk.session(saved(Image.fromarray(image_hwc), "PNG"))
        masks = await desk.masks(session_id, points=[{"x": 700, "y": 500, "label": 1}], multimask=True)
    assert [mask["rle"] for mask in masks] == [segmentation(mask, (1617, 1077)) for mask in wanted if mask.bits.size]


@pytest.mark.parametrize("size_wh", [(2400, 1601), (601, 403)])
async def test_the_classical_engine_finds_the_same_in_a_reduced_photo(size_wh: tuple[int, int]) -> None:
    image_hwc = np.asarray(Image.fromarray(photo("coffee")).resize(size_wh, Image.Resampling.BICUBIC))
    scale_x, scale_y = size_wh[0] / 600, size_wh[1] / 400
    box = tuple(edge * scale for edge, scale in zip(COFFEE_BOX, (scale_x, scale_y) * 2, strict=True))
    model = Classical()
    ((wanted,),) = segmented(model, embedded(model, image_hwc), [Prompt(box_xyxy=box)])
    async with counter(model) as desk:
        session_id = await desk.session(saved(Image.fromarray(image_hwc), "JPEG", quality=95))
        (mask,) = await desk.masks(session_id, box=list(box))
    assert iou(decoded(mask["rle"]), decoded(segmentation(wanted, size_wh))) > 0.9


async def test_png_polygon_and_run_lengths_are_one_mask() -> None:
    async with counter() as desk:
        session_id = await desk.session(FLAG)
        forms = {form: (await desk.masks(session_id, points=[[700, 300]], format=form))[0] for form in ("rle", "png", "polygon")}
    mask_hw = decoded(forms["rle"]["rle"])
    png = Image.open(io.BytesIO(base64.b64decode(forms["png"]["png"])))
    assert (png.mode, png.size) == ("P", SIZE_WH)
    np.testing.assert_array_equal(np.asarray(png.convert("RGBA"))[..., 3] == 255, mask_hw)
    polygon_hw = decoded(coco_mask.merge(coco_mask.frPyObjects(forms["polygon"]["polygons"], SIZE_WH[1], SIZE_WH[0])))
    assert iou(polygon_hw, mask_hw) > 0.95
    facts = [{name: mask[name] for name in ("score", "box", "area", "mask_ref")} for mask in forms.values()]
    assert facts[0] == facts[1] == facts[2]
    assert facts[0]["area"] == mask_hw.sum()


async def test_multimask_gives_three_best_first() -> None:
    async with counter() as desk:
        session_id = await desk.session(FLAG)
        one = await desk.masks(session_id, points=[[3, 3, 1], [90, 90, 0]])
        three = await desk.masks(session_id, points=[[3, 3]], multimask=True)
    assert len(one) == 1
    assert [mask["score"] for mask in three] == [0.9, 0.6, 0.3]


async def test_a_mask_ref_goes_back_in_without_any_state_here() -> None:
    async with counter() as desk:
        first, other = await desk.session(FLAG), await desk.session(saved(flag(*SIZE_WH), "BMP"))
        (mask,) = await desk.masks(first, points=[[600, 400]])
        for session_id in (first, other):
            for given in (mask["mask_ref"], {"rle": mask["rle"]}):
                (again,) = await desk.masks(session_id, mask=given)
                assert (again["rle"], again["mask_ref"]) == (mask["rle"], mask["mask_ref"])
        small = await desk.session(saved(flag(), "PNG"))
        assert code_of(await desk.click(small, mask=mask["mask_ref"])) == (400, "prompt_invalid")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "prompt_invalid"),
        ({"points": [[1, 1, 0]]}, "prompt_invalid"),
        ({"points": [[SIZE_WH[0], 1]]}, "prompt_invalid"),
        ({"points": [[-1, 1]]}, "prompt_invalid"),
        ({"points": [[1]]}, "params_invalid"),
        ({"points": [[1, 1]] * 300}, "params_invalid"),
        ({"box": [5, 5, 5, 9]}, "prompt_invalid"),
        ({"mask": "no reference"}, "prompt_invalid"),
        ({"mask": ""}, "prompt_invalid"),
        ({"mask": {"rle": {"size": [1, 1], "counts": [1]}}}, "prompt_invalid"),
        ({"mask": {"rle": {"size": [SIZE_WH[1], SIZE_WH[0]], "counts": [SIZE_WH[0] * SIZE_WH[1]]}}}, "prompt_invalid"),
        ({"points": [[1, 1]], "format": "gif"}, "params_invalid"),
        ({"pionts": [[1, 1]]}, "params_invalid"),
        ({"points": [[1, 1]], "supersede": "x" * 101}, "params_invalid"),
    ],
)
async def test_a_prompt_that_means_nothing_is_refused_in_a_sentence(body: dict[str, Any], code: str) -> None:
    async with counter() as desk:
        session_id = await desk.session(FLAG)
        assert code_of(await desk.click(session_id, **body)) == (400, code)


class Nothing(Mock):
    """An engine that finds nothing."""

    def segment(self, questions: Any, stop: Any) -> Any:
        return [list for _ in questions]


async def test_nothing_found_is_an_empty_list() -> None:
    async with counter(Nothing()) as desk:
        assert await desk.masks(await desk.session(FLAG), points=[[1, 1]]) == []


class TestEverything:
    """All masks, then which lies under a pixel."""

    async def test_the_smallest_mask_at_a_pixel_is_told_once_all_are_found(self) -> None:
        async with counter(Classical()) as desk:
            session_id = await desk.session(FLAG)
            for path in ("mask?x=1&y=1", "masks"):
                assert code_of(await desk.client.get(f"/session/{session_id}/{path}")) == (409, "not_generated")
            state = await desk.all_masks(session_id)
            listed = (await desk.client.get(f"/session/{session_id}/masks")).json()
            found = (await desk.client.get(f"/session/{session_id}/mask?x=100&y=100.7")).json()["mask"]
            again = await desk.client.post(f"/session/{session_id}/everything", json={})
        assert state == {"status": "done", "progress": 1.0, "count": len(listed["masks"])}
        assert (listed["width"], listed["height"]) == SIZE_WH
        assert [mask["id"] for mask in listed["masks"]] == list(range(1, len(listed["masks"]) + 1))
        assert decoded(found["rle"])[100, 100]
        assert decoded(found["rle"]).sum() == found["area"]
        assert {name: found[name] for name in ("id", "box", "area", "score")} in listed["masks"]
        assert (again.status_code, again.json()["status"]) == (202, "done")

    async def test_where_no_mask_is_there_is_null_and_outside_the_image_a_mistake(self) -> None:
        async with counter() as desk:
            session_id = await desk.session(FLAG)
            await desk.all_masks(session_id)
            there = (await desk.client.get(f"/session/{session_id}/mask?x={SIZE_WH[0] // 4 + 5}&y={SIZE_WH[1] // 4 + 5}")).json()
            nowhere = await desk.client.get(f"/session/{session_id}/mask?x=0&y=0")
            assert there["mask"]["area"] == (SIZE_WH[1] // 4) ** 2
            assert nowhere.json() == {"mask": None}
            for query, code in (("x=-1&y=0", "prompt_invalid"), ("x=nan&y=0", "params_invalid"), ("x=1", "params_invalid")):
                assert code_of(await desk.client.get(f"/session/{session_id}/mask?{query}")) == (400, code)

    async def test_parameters_are_those_of_the_kind(self) -> None:
        async with counter() as desk:
            session_id = await desk.session(FLAG)
            for body in ({"points_per_side": 65}, {"points_per_sid": 8}):
                answer = await desk.client.post(f"/session/{session_id}/everything", json=body)
                assert code_of(answer) == (400, "params_invalid")
            assert (await desk.all_masks(session_id, points_per_side=1))["count"] == 1
            assert (await desk.all_masks(session_id))["count"] == 4, "asked in another way it looks again"

    async def test_a_network_tells_how_far_it_is_and_answers_clicks_between_its_steps(self) -> None:
        model, reached, go_on = mobile_sam(), threading.Event(), threading.Event()

        class Watched:
            """The engine, held between two steps of everything once it has told some progress."""

            def __getattr__(self, name: str) -> Any:
                return getattr(model, name)

            def everything(self, embedding: Any, options: Any, stop: Any) -> Any:
                def held() -> None:
                    if told[-1] > 0.4 and not go_on.is_set():
                        reached.set()
                        go_on.wait(20)
                    stop()

                told = [0.0]
                original = options.progress

                def progress(done: float) -> None:
                    told.append(done)
                    original(done)

                object.__setattr__(options, "progress", progress)
                return model.everything(embedding, options, held)

        async with counter(Watched()) as desk:
            session_id = await desk.session(FLAG)
            await desk.client.post(f"/session/{session_id}/everything", json={"points_per_side": 8})
            await anyio.to_thread.run_sync(reached.wait, 20)
            state = (await desk.client.get(f"/session/{session_id}")).json()["everything"]
            again = await desk.client.post(f"/session/{session_id}/everything", json={"points_per_side": 8})
            clicked: list[str] = []

            async def click() -> None:
                await desk.masks(session_id, points=[[9, 9]])
                clicked.append((await desk.client.get(f"/session/{session_id}")).json()["everything"]["status"])

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(click)
                while not desk.pool._threads._lanes[Lane.CLICK]:
                    await anyio.lowlevel.checkpoint()
                go_on.set()
            assert 0.4 < state["progress"] < 1
            assert (state["status"], again.json()) == ("running", state)
            assert clicked == ["running"], "the only thread answered it before it went on"
            assert (await desk.all_masks(session_id, points_per_side=8))["status"] == "done"

    async def test_a_failure_is_a_state_and_may_be_tried_again(self) -> None:
        class Once(Mock):
            calls: list[int] = []  # noqa: RUF012 - of this test alone

            def everything(self, embedding: Any, options: Any, stop: Any) -> Any:
                self.calls.append(1)
                if len(self.calls) == 1:
                    raise RuntimeError("inner workings")
                return super().everything(embedding, options, stop)

        async with counter(Once()) as desk:
            session_id = await desk.session(FLAG)
            assert (await desk.all_masks(session_id))["status"] == "failed"
            assert (await desk.all_masks(session_id))["status"] == "done"

    async def test_a_run_whose_daemon_vanished_counts_as_failed_in_time(self) -> None:
        now = [0.0]
        async with counter(store=a_store()) as desk:
            desk.everything._clock = lambda: now[0]
            session_id = await desk.session(FLAG)
            await desk.sessions.store.write(session_id, "everything", b'{"status": "running", "asked": {}, "until": 100}')
            assert (await desk.client.get(f"/session/{session_id}")).json()["everything"]["status"] == "running"
            now[0] = 101.0
            assert (await desk.client.get(f"/session/{session_id}")).json()["everything"]["status"] == "failed"
            assert (await desk.all_masks(session_id))["status"] == "done"


@asynccontextmanager
async def held_desk(engine: Any = None, **changes: Any) -> AsyncIterator[tuple[Counter, threading.Event, str]]:
    """A desk whose only thread waits for the event, and a session there."""
    go_on, begun = threading.Event(), threading.Event()

    def hold(stop: Any) -> None:
        begun.set()
        go_on.wait(20)

    async with counter(engine, **changes) as desk:
        session_id = await desk.session(FLAG)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(desk.pool.ask, frozenset({Role.VISUAL}), hold, 60.0)
            await anyio.to_thread.run_sync(begun.wait, 20)
            try:
                yield desk, go_on, session_id
            finally:
                go_on.set()


class TestWaiting:
    """What happens while the only thread is held."""

    async def test_of_waiting_clicks_with_one_word_only_the_newest_is_answered(self) -> None:
        async with held_desk() as (desk, go_on, session_id):
            answers: dict[int, httpx.Response] = {}

            async def click(number: int, word: str) -> None:
                answers[number] = await desk.click(session_id, points=[[number, 1]], supersede=word)

            async with anyio.create_task_group() as tasks:
                for number, word in ((1, "hover"), (2, "hover"), (3, "other"), (4, "hover")):
                    tasks.start_soon(click, number, word)
                    while len(desk.pool._threads._lanes[Lane.CLICK]) < number:
                        await anyio.lowlevel.checkpoint()
                go_on.set()
        assert {number: answer.status_code for number, answer in answers.items()} == {1: 409, 2: 409, 3: 200, 4: 200}
        assert code_of(answers[1]) == (409, "superseded")

    async def test_no_more_wait_than_may_and_the_others_are_told_to_come_back(self) -> None:
        async with held_desk(waiting_max=1) as (desk, go_on, session_id), anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: desk.masks(session_id, points=[[1, 1]]))
            while not desk.pool._threads._lanes[Lane.CLICK]:
                await anyio.lowlevel.checkpoint()
            full = await desk.click(session_id, points=[[2, 2]])
            go_on.set()
        assert (*code_of(full), full.headers["Retry-After"]) == (429, "busy", "1")

    async def test_a_click_that_waits_too_long_is_given_up(self) -> None:
        async with held_desk(timeout_seconds=0.2) as (desk, go_on, session_id):
            late = await desk.click(session_id, points=[[1, 1]])
            assert (*code_of(late), late.headers["Retry-After"]) == (503, "timeout", "1")
            assert len(desk.pool._asks) == 1, "what holds the thread, and nothing else"
            go_on.set()

    async def test_a_client_that_goes_away_while_waiting_is_not_computed_for(self) -> None:
        seen: list[Any] = []

        class Seeing(Mock):
            def segment(self, questions: Any, stop: Any) -> Any:
                seen.extend(question.prompt.points_xy[0] for question in questions)
                return super().segment(questions, stop)

        async with held_desk(Seeing()) as (desk, go_on, session_id):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: desk.click(session_id, points=[[1, 1]]))
                while len(desk.pool._asks) < 2:
                    await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
            with anyio.fail_after(10):
                while len(desk.pool._asks) > 1:
                    await anyio.lowlevel.checkpoint()
            go_on.set()
            await desk.masks(session_id, points=[[2, 2]])
        assert seen == [(2.0, 2.0)]
