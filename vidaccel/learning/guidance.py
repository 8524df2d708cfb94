"""The weights with which a pipeline's guidance combines the branches of a step."""

from typing import Any

import torch

from vidaccel.learning.token_slots import NotLearnable

# Branch names of pipelines and guiders -> with the prompt, or without.
_WITH, _WITHOUT = {"cond", "pred_cond"}, {"uncond", "pred_uncond"}
_BATCHED = "cond_uncond"


def branch_parts(branch: str, outputs: torch.Tensor, pipe: Any) -> list[tuple[str, torch.Tensor]]:
    """Split the outputs of one call by branch: a batched call holds the one without prompt first.

    Args:
        branch: the name of the call.
        outputs: [R, B, M].
        pipe: the pipeline that is running.

    Returns:
        (branch, [R, B, M]) of each.
    """
    if branch != _BATCHED or not getattr(pipe, "do_classifier_free_guidance", False):
        return [(branch, outputs)]
    if outputs.shape[1] % 2:
        raise NotLearnable("its batch is not one half without prompt and one with")
    without, with_prompt = outputs.chunk(2, dim=1)
    return [("uncond", without), ("cond", with_prompt)]


def branch_weights(branches: set[str], scale: float | None) -> dict[str, float]:
    """Return the weight of each branch in the output that the sampler is given.

    Args:
        branches: those of a step.
        scale: the guidance scale.

    Raises:
        NotLearnable: nothing says how they are combined.
    """
    if len(branches) == 1:
        return {next(iter(branches)): 1.0}
    with_prompt, without = branches & _WITH, branches & _WITHOUT
    if len(branches) == 2 and with_prompt and without:
        if scale is None:
            raise NotLearnable("no guidance scale was found on the pipeline")
        return {next(iter(with_prompt)): scale, next(iter(without)): 1.0 - scale}
    raise NotLearnable(f"how its branches {', '.join(sorted(branches))} are combined is not known")
