"""The demo's tasks, one entry each: what is asked of which photo, and how it must end. A new kind adds its entries here; the demo
leaves out those that this host cannot serve."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AFTER = "{after}"
SPOON = [[315, 250], [345, 230], [385, 240], [400, 290], [360, 310], [325, 300]]
PHOTOS = Path(__file__).with_name("photos")
CREDITS = "Photos: Eileen Collins (NASA, public domain); Chelsea by Stéfan van der Walt, coffee by Rachel Michetti (both CC0)."


@dataclass(frozen=True, slots=True)
class Example:
    """One task of the demo. `ends` is "done", or the code of the error that it must end with."""

    title: str
    kind: str
    photo: str
    params: Mapping[str, Any]
    text: str | None = None
    ends: str = "done"
    after: str | None = None
    """The title of an earlier example that this one waits for; AFTER in the params becomes the id of its task."""
    own_photo: bool = True
    """Whether the row names the photo; else it takes the image that the earlier task left."""

    def asked(self, task_ids: Mapping[str, str]) -> dict[str, Any]:
        """The params of the row, given the tasks of the examples so far by their titles."""
        text = json.dumps(self.params)
        return dict(json.loads(text if self.after is None else text.replace(AFTER, task_ids[self.after])))

    def ended_well(self, row: Mapping[str, Any]) -> bool:
        """Whether the task's row says what it must."""
        return bool(row["status"] == "done") if self.ends == "done" else (row["error"] or {}).get("code") == self.ends


EXAMPLES = (
    Example("Every eye, by its name", "segment_concept", "chelsea.jpg", {}, "eye"),
    Example("Two things, by their names", "segment_concept", "coffee.jpg", {"texts": ["cup", "spoon"]}),
    Example("A box around the cat", "segment_visual", "chelsea.jpg", {"boxes": [[20, 0, 405, 299]]}, "cat"),
    Example("One click on the cup", "segment_visual", "coffee.jpg", {"points": [[290, 150]]}, "cup"),
    Example(
        "Three objects in one task",
        "segment_visual",
        "astronaut.jpg",
        {"objects": [{"points": [[220, 120]]}, {"box": [20, 190, 400, 512]}, {"box": [300, 340, 512, 512]}]},
    ),
    Example("Two clicks, both eyes", "segment_visual", "chelsea.jpg", {"points": [[200, 120], [300, 150]]}, "eyes"),
    Example("Everything, finely", "segment_everything", "coffee.jpg", {}),
    Example(
        "The head, not the collar",
        "segment_visual",
        "astronaut.jpg",
        {"points": [{"x": 220, "y": 120, "label": 1}, {"x": 210, "y": 232, "label": 0}]},
        "head",
    ),
    Example("A box around it all", "segment_visual", "coffee.jpg", {"boxes": [[70, 10, 480, 385]]}, "cup and saucer"),
    Example(
        "A rough outline, made exact",
        "segment_visual",
        "coffee.jpg",
        {"objects": [{"mask": {"polygon": SPOON}}]},
        "spoon",
    ),
    Example("Everything, coarsely", "segment_everything", "astronaut.jpg", {"points_per_side": 6, "min_mask_area": 400}),
    Example("One click, three answers", "segment_visual", "astronaut.jpg", {"points": [[220, 120]], "multimask": True}),
    Example(
        "The cup without the spoon",
        "combine_masks",
        "coffee.jpg",
        {"masks": [{"task_id": AFTER}, {"polygon": SPOON}], "op": "difference"},
        after="A box around it all",
    ),
    Example(
        "The cup in blue",
        "paint_masks",
        "coffee.jpg",
        {"layers": [{"mask": {"task_id": AFTER}, "color": "#1C6FE0", "opacity": 0.6}], "format": "JPEG"},
        after="The cup without the spoon",
    ),
    Example(
        "The same as a small WEBP",
        "convert_image",
        "coffee.jpg",
        {"format": "WEBP", "max_side": 300},
        after="The cup in blue",
        own_photo=False,
    ),
    Example("The table without the spoon", "remove_object", "coffee.jpg", {"masks": [{"polygon": SPOON}]}),
    Example("A rose instead of the spoon", "fill_object", "coffee.jpg", {"masks": [{"polygon": SPOON}], "seed": 7}, "a red rose"),
    Example(
        "The astronaut before a plain wall",
        "replace_background",
        "astronaut.jpg",
        {"boxes": [[20, 5, 420, 512]], "color": "#D9D4C7", "format": "JPEG"},
    ),
    Example(
        "The cat in front, the rest out of focus",
        "replace_background",
        "chelsea.jpg",
        {"boxes": [[20, 0, 405, 299]], "blur": 14, "format": "JPEG"},
    ),
    Example("A click beside the photo", "segment_visual", "coffee.jpg", {"points": [[900, 120]]}, ends="prompt_invalid"),
    Example("A misspelt parameter", "segment_visual", "chelsea.jpg", {"bboxes": [[20, 0, 405, 299]]}, ends="params_invalid"),
)
