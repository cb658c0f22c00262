"""Calibration data of a run that is only planned: real ones, or assumptions (for `forecast`).

Assumed samples have the lengths and grids of real ones and nothing in them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from mgvq_quantizer import plain_text
from mgvq_quantizer.calibration import CalibrationError, Sample, load_conversations
from mgvq_quantizer.dataset import Data, check_pictures, read_data, split_data
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_runtime.checkpoint.reader import Checkpoint
from mgvq_runtime.errors import ConfigError, TokenizerError
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.registry import find_family
from mgvq_runtime.request import ImageInput

TEXT_TOKENS = 200
"""Of an assumed conversation, with the template's and without the picture's."""
ANSWER_TOKENS = 100
"""Of them, those of answers."""
PICTURE_SIZE = (640, 480)
"""Width and height in pixels of an assumed picture."""


def expected_data(
    source: Checkpoint, graph: CausalLM, recipe: QuantRecipe, path: Path | None
) -> tuple[Data, str]:
    """Read the calibration data as a run would, or assume some where that is not possible.

    Data are assumed where a folder without weights names none, or has no tokenizer to read them.

    Args:
        source: the model's folder, which may hold config.json alone.
        graph: its model.
        recipe: how many conversations.
        path: what the user named.

    Returns:
        The samples, and in words what was assumed; nothing where they are real.

    Raises:
        CalibrationError: if data that were named cannot be used.
    """
    count = recipe.max_samples
    if path is None and not source.dense and not (source.path / "calibration.zip").is_file():
        return _assumed(source, graph, recipe, count)
    try:
        data = read_data(source.path, graph, recipe, path, source)
    except (TokenizerError, ConfigError):
        if source.dense:
            raise
        if not plain_text.holds_conversations(path):
            return _assumed_text(graph, recipe, path)
        _, conversations = load_conversations(path, source.path, graph.visual is not None)
        if not plain_text.holds_text(path):
            count = min(count, len(conversations))
        return _assumed(source, graph, recipe, count)
    check_pictures(data, graph)
    return data, ""


def _assumed(
    source: Checkpoint, graph: CausalLM, recipe: QuantRecipe, count: int
) -> tuple[Data, str]:
    """Make conversations of one length, each with a picture of its own."""
    picture = _picture(source, graph, recipe)
    tokens = TEXT_TOKENS + (picture.num_tokens if picture else 0)
    is_answer = np.arange(tokens) >= tokens - ANSWER_TOKENS
    sample = Sample(
        "assumed", np.zeros(tokens, np.int64), np.zeros((3, tokens), np.int64), is_answer, ()
    )
    samples = []
    for _ in range(max(2, count)):
        images = (dataclasses.replace(picture),) if picture else ()
        samples.append(dataclasses.replace(sample, images=images))
    said = f"{len(samples)} conversations of {TEXT_TOKENS} tokens of text, {ANSWER_TOKENS} of them "
    said += "answers"
    if picture:
        said += f", and one picture of {picture.num_tokens} tokens, {picture.num_patches} patches"
    return split_data("assumed", samples, recipe, ""), said


def _assumed_text(graph: CausalLM, recipe: QuantRecipe, path: Path | None) -> tuple[Data, str]:
    """Make as many whole passages as a run takes at most; how many a text has only tokens tell."""
    if path is None or not path.exists():
        raise CalibrationError(f"{path} does not exist: give a file, a folder or a zip file")
    ids = np.zeros(plain_text.PASSAGE_TOKENS, np.int64)
    count = max(2, recipe.max_samples)
    samples = [plain_text.text_sample(plain_text.Passage(path.name, ids)) for _ in range(count)]
    data = split_data(path.name, samples, recipe, "")
    check_pictures(data, graph)
    return data, f"{count} passages of {plain_text.PASSAGE_TOKENS} tokens"


def _picture(source: Checkpoint, graph: CausalLM, recipe: QuantRecipe) -> ImageInput | None:
    """Cut a picture as the family does; where its folder does not say how, as its config says."""
    family = find_family(source.config)
    vision = graph.config.vision_config
    if family.image_processor is None or vision is None:
        return None
    most = recipe.max_image_tokens or family.max_image_tokens
    try:
        processor = family.image_processor.from_folder(source.path, most)
    except ConfigError:
        side = vision.patch_size * vision.spatial_merge_size
        columns, rows = (round(pixels / side) for pixels in PICTURE_SIZE)
        rows = min(rows, max(1, (most or rows * columns) // columns))
        merge = vision.spatial_merge_size
        grid = (1, rows * merge, columns * merge)
        patches = np.zeros((rows * columns * merge**2, vision.patch_dim), np.float32)
        return ImageInput(patches, grid, rows * columns)
    return processor(Image.new("RGB", PICTURE_SIZE))
