"""Many generations in one process: does memory grow, does anything carry over?"""

import gc
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from vidaccel.api import accelerate, report
from vidaccel.dbcache import DBCache

# What a server sees: sizes, lengths and numbers of steps in turn. They repeat, so that equal
# requests come again after others.
REQUESTS: tuple[dict[str, Any], ...] = (
    {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 12},
    {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 10},
    {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 16},
    {"height": 48, "width": 32, "num_frames": 9, "num_inference_steps": 6},
    {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 9, "guidance_scale": 1.0},
)
PROMPTS = (
    "a cyan dotted square moving up on a maroon striped background",
    "a red striped circle moving right on a navy dotted background",
)


def requests(arguments: tuple[dict[str, Any], ...] = REQUESTS) -> Iterator[tuple[int, dict]]:
    """The requests in turn, for ever, each with its number among the different ones."""
    kinds = [
        {**kwargs, "prompt": prompt, "seed": seed}
        for seed, prompt in enumerate(PROMPTS)
        for kwargs in arguments
    ]
    return cycle(enumerate(kinds))


def soak(
    pipe: Any,
    generations: int = 200,
    stream: Iterator[tuple[int, dict]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Generate again and again with an accelerated pipeline and watch the memory of the process.

    Args:
        pipe: the pipeline; it is accelerated with a plan that a block cache guards.
        generations: how many.
        stream: numbered requests with a "seed"; those of this module when None.
        progress: is told the generations done and the resident bytes after each.

    Returns:
        `rss_bytes` after each generation, `growth_bytes`: the mean of its last quarter minus that
        of the second one (the first fills caches of torch); `held_bytes`: the most cached tensors
        that outlived a generation; `different`: equal requests whose latents were not bit-equal;
        `kinds`: the number of different requests.
    """
    cache = DBCache(threshold=0.2, warmup_steps=2)
    accelerate(pipe, policy="every 2", cache=cache)
    first: dict[int, torch.Tensor] = {}
    resident, held, different = [], 0, 0
    for done, (kind, request) in zip(range(generations), stream or requests(), strict=False):
        kwargs = {"output_type": "latent", **request}
        generator = torch.Generator().manual_seed(kwargs.pop("seed"))
        latents = pipe(generator=generator, **kwargs).frames
        different += not torch.equal(first.setdefault(kind, latents), latents)
        held = max(held, *(part.bytes_held for part in report(pipe).transformers), 0)
        gc.collect()
        resident.append(_resident_bytes())
        if progress is not None:
            progress(done + 1, resident[-1])
    quarter = max(1, generations // 4)
    second, last = resident[quarter : 2 * quarter] or resident, resident[-quarter:]
    return {
        "generations": generations,
        "kinds": len(first),
        "different": different,
        "held_bytes": held,
        "growth_bytes": round(sum(last) / len(last) - sum(second) / len(second)),
        "rss_bytes": resident,
        "settings": f"every 2 with {cache}",
    }


def _resident_bytes() -> int:
    """Resident memory of this process: of Linux, 0 elsewhere."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    import resource

    return int(statm.read_text().split()[1]) * resource.getpagesize()
