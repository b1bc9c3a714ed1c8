"""Whatever is sent to the session endpoints is answered, by the client's mistake at worst; and what is offered is documented."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args

import anyio
import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.desk import Counter, counter
from support.pictures import flag, saved

from daemon.server import STATUS, Server
from daemon.session_bodies import ImageBody, PredictBody
from daemon.session_masks import listed, packed, reference_of, referred, smallest_at
from handlers.base import RejectedError
from handlers.segment_everything import EverythingParams
from models.base import Mask, pack

DOCUMENT = json.loads((Path(__file__).parents[2] / "daemon" / "openapi.json").read_text())
SMALL = saved(flag(), "PNG")
NUMBERS = st.one_of(st.integers(-5, 60), st.floats(), st.integers(), st.booleans(), st.text(max_size=3), st.none())
JSON = st.recursive(NUMBERS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4))
POINTS = st.lists(
    st.one_of(st.lists(NUMBERS, max_size=4), st.fixed_dictionaries({"x": NUMBERS, "y": NUMBERS}, optional={"label": NUMBERS})),
    max_size=4,
)
RLES = st.fixed_dictionaries(
    {
        "size": st.one_of(st.just([32, 48]), JSON),
        "counts": st.one_of(st.text(max_size=20), st.lists(st.integers(-1, 2000), max_size=6), JSON),
    }
)
REFERENCES = st.one_of(
    st.text(max_size=40),
    st.binary(max_size=40).map(lambda data: base64.urlsafe_b64encode(data).decode()),
    st.tuples(st.integers(0, 60), st.integers(0, 60), st.text("0123456789:;<=>?@ABCPQRabcpqr", max_size=20)).map(
        lambda made: base64.urlsafe_b64encode(zlib.compress(f"{made[0]} {made[1]} {made[2]}".encode())).decode()
    ),
)
BODIES = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {},
        optional={
            "points": POINTS | JSON,
            "box": st.lists(NUMBERS, max_size=5) | JSON,
            "mask": REFERENCES | st.fixed_dictionaries({"rle": RLES}) | JSON,
            "multimask": JSON,
            "format": st.sampled_from(["rle", "png", "polygon"]) | JSON,
            "supersede": st.text(max_size=5) | JSON,
        },
    ),
)
FUZZ = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


async def never_5xx(requests: Callable[[Counter, str], AsyncIterator[httpx.Response]]) -> None:
    """Every answer to these requests is no fault of ours, and every refusal says why."""
    async with counter() as desk:
        session_id = await desk.session(SMALL)
        async for answer in requests(desk, session_id):
            assert answer.status_code < 500, (answer.request.url, answer.request.content[:500], answer.text)
            if answer.status_code >= 400 and answer.headers["Content-Type"].startswith("application/json"):
                assert answer.json()["error"]["message"]


@given(bodies=st.lists(BODIES, min_size=5, max_size=15))
@FUZZ
def test_no_json_is_too_much_for_the_session_endpoints(bodies: list[Any]) -> None:
    async def requests(desk: Counter, session_id: str) -> AsyncIterator[httpx.Response]:
        for body in bodies:
            for path in (f"/session/{session_id}/predict", f"/session/{session_id}/everything", "/session"):
                content = json.dumps(body).encode()
                yield await desk.client.post(path, content=content, headers={"Content-Type": "application/json"})

    anyio.run(never_5xx, requests)


@given(
    raw=st.lists(st.binary(max_size=200), min_size=3, max_size=8),
    query=st.tuples(st.text(max_size=6), st.text(max_size=6)),
    names=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5),
)
@FUZZ
def test_no_bytes_are_too_much_for_them(raw: list[bytes], query: tuple[str, str], names: list[str]) -> None:
    async def requests(desk: Counter, session_id: str) -> AsyncIterator[httpx.Response]:
        for data in raw:
            yield await desk.upload(data)
            yield await desk.upload(SMALL[:40] + data)
            for kind in ("multipart/form-data; boundary=b", "multipart/form-data", "application/json", "image/png"):
                for path in ("/session", f"/session/{session_id}/predict", f"/session/{session_id}/everything"):
                    yield await desk.client.post(path, content=b"--b\r\n" + data, headers={"Content-Type": kind})
        yield await desk.client.get(f"/session/{session_id}/mask", params={"x": query[0], "y": query[1]})
        for name in names:
            for method in ("GET", "POST", "DELETE", "PUT", "OPTIONS"):
                escaped = "".join(f"%{byte:02x}" for byte in name.encode("utf-8", "surrogatepass"))
                yield await desk.client.request(method, f"/session/{escaped}")
                yield await desk.client.request(method, f"/session/{session_id}/{escaped}")

    anyio.run(never_5xx, requests)


@st.composite
def masks(draw: Any) -> tuple[Mask, tuple[int, int]]:
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    bits = draw(st.lists(st.booleans(), min_size=width * height, max_size=width * height))
    return pack(np.array(bits).reshape(height, width), score=0.5), (width, height)


@given(masks())
@settings(max_examples=100, deadline=None)
def test_a_reference_and_a_pack_give_the_very_mask_back(made: tuple[Mask, tuple[int, int]]) -> None:
    mask, size_wh = made
    if not mask.bits.size:
        return
    again = referred(reference_of(mask, size_wh), size_wh)
    assert (again.box_xyxy, again.bits.tolist()) == (mask.box_xyxy, mask.bits.tolist())
    data = packed([mask], size_wh)
    assert listed(data)["masks"] == [{"id": 1, "box": list(mask.box_xyxy), "area": mask.area, "score": 0.5}]
    seen_hw = mask.window_hw((0, 0, *size_wh))
    for y in range(size_wh[1]):
        for x in range(size_wh[0]):
            assert (smallest_at(data, x + 0.5, y) is not None) == seen_hw[y, x]


def test_a_reference_that_would_inflate_without_end_is_refused_in_time() -> None:
    bomb = base64.urlsafe_b64encode(zlib.compress(b"48 32 " + b"1" * 50_000_000)).decode()
    with pytest.raises(RejectedError):
        referred(bomb, (48, 32))


class TestDocument:
    """openapi.json against the code."""

    @pytest.mark.anyio
    async def test_it_names_every_route_and_no_other(self) -> None:
        async with _served() as (server, client):
            assert server._runner is not None
            app = server._runner.app
            served = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource is not None}
            assert (await client.get("/openapi.json")).json() == DOCUMENT
        methods = ("get", "post", "delete", "put", "patch")
        documented = {(verb.upper(), path) for path, item in DOCUMENT["paths"].items() for verb in methods if verb in item}
        assert {route for route in served if route[0] != "HEAD"} == documented

    def test_it_is_valid_openapi(self) -> None:
        validator = pytest.importorskip("openapi_spec_validator")
        validator.validate(DOCUMENT)

    @pytest.mark.parametrize("shape", [PredictBody, ImageBody, EverythingParams])
    def test_bodies_have_the_parameters_of_the_code(self, shape: Any) -> None:
        named = {PredictBody: "PredictBody", ImageBody: "ImageBody", EverythingParams: "EverythingBody"}[shape]
        schema = DOCUMENT["components"]["schemas"][named]
        assert set(schema["properties"]) == set(shape.model_fields)
        required = {name for name, field in shape.model_fields.items() if field.is_required()}
        assert set(schema.get("required", ())) == required

    def test_forms_and_statuses_are_those_of_the_code(self) -> None:
        schema = DOCUMENT["components"]["schemas"]["PredictBody"]["properties"]
        assert tuple(schema["format"]["enum"]) == get_args(PredictBody.model_fields["format"].annotation)
        assert {str(status) for status in STATUS.values()} <= set(DOCUMENT["components"]["responses"])


@asynccontextmanager
async def _served() -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
    async with counter() as desk:
        yield desk.server, desk.client
