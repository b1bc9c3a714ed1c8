"""Ten concepts in one image by SAM 3, against ten calls of the library as in its example: encode, answer and enlarge each time.

The network is of middle size with random weights, on one CPU thread in float32: 20 layers of width 640 over 16 x 16 patches stand
for 32 of width 1024 over 72 x 72, and a head of width 128 for one of 256. So the parts keep their proportions: encoding an image
takes 13 to 14 times as many operations as answering a prompt, in the released network (5.6 by 0.42 TFLOP) and in this one (55 by
4 GFLOP). A CPU makes fewer a second of small matrices: in time the head weighs twice as much here, to our disadvantage.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bench.child import answer, lacks
from bench.ground import Ground
from bench.report import Report, ratios
from PIL import Image
from support.photos import photo
from support.sam3_checkpoints import TOKENS, configuration, save_vocabulary

from models.base import ConceptPrompt, ConceptQuestion, ImageHWC, Mask
from models.sam3 import load
from models.torch_device import Placement

PROMPTS, ROUNDS = 10, 3
SIZE_WH = (1000, 750)
GRID, PATCH, WIDTH, LAYERS, HEAD_WIDTH, QUERIES = 16, 14, 640, 20, 128, 100
SHOWN = 10
"""How many instances of each prompt are returned; random weights' scores would let all of them pass a threshold, or none."""
NEEDED = ("torch", "transformers")


def run(_: Ground, report: Report) -> None:
    """Measure in a process of its own, in rounds of both sides."""
    report.title(
        "concept", f"{PROMPTS} new texts about one new image, by {PROMPTS} calls of the library, one thread, random weights"
    )
    if lacks(report, NEEDED):
        return
    found = answer("bench.concept")
    report.note(f"in time, encoding an image costs {found['proportion']:.1f} times as much as answering a prompt on this host")
    report.side("ours", found["ours"], "s")
    report.side("the library, call by call", found["theirs"], "s")
    report.at_least("library / ours", ratios(found["theirs"], found["ours"]), 4)
    report.at_most("difference of logits, most, x 10,000", [found["logits"] * 10_000], 1)
    report.at_most("difference of scores, most, x 10,000", [found["scores"] * 10_000], 1)
    report.at_least(f"spread of the logits, of {found['instances']} instances", [found["spread"]], 0.1)


def middling() -> Any:
    """The architecture: every part of the released one, and of its kind."""
    from transformers import Sam3Config

    head = {"hidden_size": HEAD_WIDTH, "num_attention_heads": 8}
    layers = {**head, "num_layers": 6, "intermediate_size": 8 * HEAD_WIDTH}
    small = configuration().detector_config
    vision, text = small.vision_config.to_dict(), small.text_config.to_dict()
    vision["backbone_config"] |= {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": WIDTH // 64,
        "image_size": GRID * PATCH,
        "global_attn_indexes": [LAYERS * part // 4 - 1 for part in (1, 2, 3, 4)],
    }
    vision |= {"fpn_hidden_size": HEAD_WIDTH, "backbone_feature_sizes": [[scale * GRID] * 2 for scale in (4, 2, 1)]}
    text |= {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": TOKENS}
    return Sam3Config(
        vision_config=vision,
        text_config=text,
        geometry_encoder_config={**layers, "num_layers": 3},
        detr_encoder_config=layers,
        detr_decoder_config={**layers, "num_queries": QUERIES},
        mask_decoder_config=head,
    )


def save(folder: Path) -> None:
    """Random weights as the hub has them."""
    import torch
    from safetensors.torch import save_file
    from transformers import Sam3Model

    torch.manual_seed(5)
    config = middling()
    weights = Sam3Model(config).state_dict()
    for values in weights.values():
        if values.dim() > 1:
            values.normal_(0, values[0].numel() ** -0.5)
    config.save_pretrained(folder)
    save_file({name: values.contiguous() for name, values in weights.items()}, folder / "model.safetensors")
    save_vocabulary(folder)


class Library:
    """The released example: processor, model and post-processing, once per text."""

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPTokenizer, Sam3Model
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.network = Sam3Model.from_pretrained(folder).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)

    def find(self, image_hwc: ImageHWC, text: str) -> tuple[Any, Any, Any]:
        """Scores (queries,), logits (queries, low, low), and the int64 masks at full size of the SHOWN best."""
        import torch

        side = GRID * PATCH
        square = np.array(Image.fromarray(image_hwc).resize((side, side), Image.Resampling.BILINEAR))
        pixels = (torch.from_numpy(square).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
        tokens = self.tokenizer([text], padding="max_length", max_length=32, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            found = self.network(pixel_values=pixels, **tokens)
            # `post_process_instance_segmentation`, whose class cannot be imported without torchvision.
            scores = (found.pred_logits.sigmoid() * found.presence_logits.sigmoid())[0]
            masks = found.pred_masks.sigmoid()[0][scores > scores.sort(descending=True).values[SHOWN]]
            masks = torch.nn.functional.interpolate(masks[None], size=image_hwc.shape[:2], mode="bilinear")[0]
            return scores, found.pred_masks[0], (masks > 0.5).to(torch.long)


class Ours:
    """The engine as the daemon holds it, which also keeps what its head said."""

    def __init__(self, folder: Path) -> None:
        engine = load(folder, Placement())
        self.said: list[tuple[Any, Any]] = []

        def head(*given: Any) -> tuple[Any, Any]:
            self.said.append(engine.head(*given))
            return self.said[-1]

        self.engine = replace(engine, head=head)

    def find(self, image_hwc: ImageHWC, texts: Sequence[str]) -> list[list[Mask]]:
        """The masks of every text."""
        self.said.clear()
        [embedding] = self.engine.embed([self.engine.shrink(image_hwc)])
        questions = [ConceptQuestion(embedding, ConceptPrompt(text=text), 0.0, SHOWN) for text in texts]
        return [later() for later in self.engine.find(questions, lambda: None)]


def measure() -> dict[str, Any]:
    """Seconds of both sides, round by round, and by how much their answers differ at most."""
    import torch

    image_hwc = np.asarray(Image.fromarray(photo("astronaut")).resize(SIZE_WH, Image.Resampling.BICUBIC))
    with tempfile.TemporaryDirectory() as name:
        save(Path(name))
        ours, library = Ours(Path(name)), Library(Path(name))
    library.find(image_hwc, "something")
    ours.find(image_hwc, ["something", "else"])
    took: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(ROUNDS):
        texts = [f"thing {number} {index}" for index in range(PROMPTS)]
        marks = [time.perf_counter()]
        masks = ours.find(image_hwc, texts)
        marks.append(time.perf_counter())
        found = [library.find(image_hwc, text)[:2] for text in texts]
        marks.append(time.perf_counter())
        for side, seconds in zip(took.values(), np.diff(marks), strict=True):
            side.append(float(seconds))
    mine = [torch.cat(parts) for parts in zip(*ours.said, strict=True)]
    other = [torch.stack(parts) for parts in zip(*found, strict=True)]
    apart = [float((a - b).abs().max()) for a, b in zip(mine, other, strict=True)]
    return {
        **took,
        "scores": apart[0],
        "logits": apart[1],
        "spread": float(other[1].std()),
        "instances": sum(len(each) for each in masks),
        "proportion": proportion(ours, image_hwc),
    }


def proportion(ours: Ours, image_hwc: ImageHWC) -> float:
    """How many prompts take the time of one image, on this host."""
    small = ours.engine.shrink(image_hwc)
    seconds = []
    for texts in ((), [f"more {index}" for index in range(PROMPTS)]):
        began = time.perf_counter()
        [embedding] = ours.engine.embed([small])
        ours.engine.find([ConceptQuestion(embedding, ConceptPrompt(text=text), 2.0) for text in texts], lambda: None)
        seconds.append(time.perf_counter() - began)
    return seconds[0] / (seconds[1] - seconds[0]) * PROMPTS


if __name__ == "__main__":
    print(json.dumps(measure()))
