"""Policies built on tiny pipelines."""

from typing import Any

from tiny.base import Case, embeds
from vidaccel.calibration.build import build_policy


def prompted(case: Case) -> Any:
    """The case with prompts taken from a table, since its pipeline has no text encoder.

    Its `call` is what the pipeline is called with besides a prompt and the number of steps.
    """

    def encode_prompt(prompt: str, *_: Any, **__: Any) -> Any:
        return embeds(len(prompt)), embeds(99)

    case.pipe.encode_prompt = encode_prompt
    case.call = {"height": 16, "width": 16, "num_frames": 9, "guidance_scale": 5.0}
    return case


def build_for(case: Any, **options: Any) -> Any:
    """A policy from the smallest search: five steps, two short prompts, nothing validated."""
    arguments = {"num_inference_steps": 5, "max_skip": 3, "call_kwargs": case.call}
    arguments |= {"validate": False, "progress": False}
    return build_policy(case.pipe, ["a", "bb"], **(arguments | options))
