"""What a task may ask of segment_concept, in every accepted spelling, and what it is told when it asks for something else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from support.kinds import blob, done, job_of, models_of

from handlers import segment_concept
from handlers.base import Limits, RejectedError, Request
from handlers.segment_concept import Wish


def parsed(params: Mapping[str, Any], text: str | None = None) -> Wish:
    return segment_concept.parse(Request("segment_concept", "a.jpg", text, params), Limits())


def refused(params: Mapping[str, Any], text: str | None = None) -> tuple[str, str]:
    with pytest.raises(RejectedError) as caught:
        parsed(params, text)
    return caught.value.code, caught.value.message


def test_one_text_is_enough() -> None:
    assert parsed({}, "  the red car ") == Wish(("the red car",), (), 0.5, 100)


def test_several_texts_count_once_each_in_their_order() -> None:
    assert parsed({"texts": ["car", "dog", "car "]}).texts == ("car", "dog")


def test_examples_come_with_labels_in_either_spelling() -> None:
    one = parsed({"boxes": [[1, 2, 30, 40], {"box": [5, 5, 9, 9], "label": 0}]})
    other = parsed({"boxes": [[1, 2, 30, 40], [5, 5, 9, 9]], "box_labels": [1, 0]})
    assert one == other
    assert [(example.box, example.label) for example in one.examples] == [((1, 2, 30, 40), 1), ((5, 5, 9, 9), 0)]


@pytest.mark.parametrize(
    ("params", "text", "code", "words"),
    [
        ({}, None, "prompt_invalid", "set text_prompt"),
        ({"boxes": [{"box": [0, 0, 9, 9], "label": 0}]}, None, "prompt_invalid", "set text_prompt"),
        ({"texts": ["car"]}, "dog", "params_invalid", "either text_prompt or texts"),
        ({"texts": ["car", " "]}, None, "prompt_invalid", "empty"),
        ({"texts": []}, None, "params_invalid", "at least 1"),
        ({"texts": [f"thing {n}" for n in range(17)]}, None, "params_invalid", "at most 16"),
        ({"texts": ["car", "dog"], "boxes": [[0, 0, 9, 9]]}, None, "params_invalid", "ambiguous"),
        ({"boxes": [[0, 0, 9, 9]], "box_labels": [1, 1]}, None, "params_invalid", "one label for each"),
        ({"boxes": [[0, 0, 9, 9]] * 65}, None, "params_invalid", "at most 64"),
        ({"max_instances": 201}, "car", "params_invalid", "at most 200"),
        ({"max_instances": 0}, "car", "params_invalid", "greater than or equal to 1"),
        ({"threshold": 1.5}, "car", "params_invalid", "less than or equal to 1"),
        ({"treshold": 0.5}, "car", "params_invalid", 'did you mean "threshold"?'),
        ({}, "빨간 자동차", "prompt_language", "English"),
        ({}, "красная машина", "prompt_language", "English"),
        ({}, "car " * 400, "params_invalid", "1000"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_words(params: Mapping[str, Any], text: str | None, code: str, words: str) -> None:
    said = refused(params, text)
    assert said[0] == code
    assert words in said[1]


@pytest.mark.parametrize("text", ["a café table", "naïve façade", "2nd car, left!", "São Paulo's trees", "n° 5", "5 µm"])
def test_accents_figures_and_signs_are_no_other_language(text: str) -> None:
    assert parsed({}, text).texts == (text,)


def test_a_text_of_too_many_tokens_is_refused_before_the_model_runs() -> None:
    with pytest.raises(RejectedError) as caught:
        segment_concept.prepare(job_of(segment_concept, {}, "very " * 40 + "red car"), models_of("mock"))
    assert caught.value.code == "prompt_invalid"
    assert "44 tokens and 32 are read" in caught.value.message


def test_an_example_outside_the_image_is_refused() -> None:
    with pytest.raises(RejectedError, match="outside the image"):
        segment_concept.prepare(job_of(segment_concept, {"boxes": [[700, 0, 800, 10]]}), models_of("mock"))


def test_each_text_has_its_instances_its_category_and_its_place() -> None:
    result = done(segment_concept, job_of(segment_concept, {"texts": ["car", "x"], "threshold": 0.75}), models_of("mock"))
    assert [(label["label"], label["object"], label["score"]) for label in result.labels] == [
        ("car", 0, 0.9),
        ("car", 0, 0.8),
        ("x", 1, 0.9),
    ]
    document = json.loads(blob(result, "masks_url"))
    assert [category["name"] for category in document["categories"]] == ["car", "x"]
    assert result.metadata["threshold"] == 0.75


def test_the_place_of_a_text_is_where_it_stood_also_when_texts_repeat() -> None:
    result = done(segment_concept, job_of(segment_concept, {"texts": ["cup", "cup ", "x"], "threshold": 0.85}), models_of("mock"))
    assert [(label["label"], label["object"]) for label in result.labels] == [("cup", 0), ("x", 2)]


def test_many_texts_share_the_masks_of_a_result_and_the_result_says_so() -> None:
    wish = parsed({"texts": [f"thing {number}" for number in range(16)], "max_instances": 200})
    assert wish.max_instances == 25
    result = done(segment_concept, job_of(segment_concept, {"texts": ["a", "b", "c"], "max_instances": 200}), models_of("mock"))
    assert result.metadata["warnings"] == ["max_instances was lowered to 133: 3 texts share 400 masks"]


def test_one_text_needs_no_place_and_max_instances_keeps_the_best() -> None:
    result = done(segment_concept, job_of(segment_concept, {"max_instances": 1}, "car"), models_of("mock"))
    assert [(label["label"], label["object"], label["score"]) for label in result.labels] == [("car", None, 0.9)]


def test_examples_alone_are_called_so() -> None:
    result = done(segment_concept, job_of(segment_concept, {"boxes": [[10, 10, 90, 90]]}), models_of("mock"))
    assert {label["label"] for label in result.labels} == {"example"}
