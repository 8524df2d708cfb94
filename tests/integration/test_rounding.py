"""A call is placed in its step however its pipeline rounds the time, for every number of steps.

The pipelines run whole in half precision, but for their transformers: these answer zeros of the
right shapes, and look at the time that they are given.
"""

import itertools
from collections.abc import Callable
from functools import wraps

import diffusers
import pytest
import torch
from packaging.version import Version

from tiny import CASES, CORE, SINCE
from tiny.base import unipc
from vidaccel.api import accelerate
from vidaccel.engine.call_arguments import ASIDE
from vidaccel.engine.engine import engine_of
from vidaccel.engine.observer import Observer
from vidaccel.hosts.registry import find_transformers

EVERY = range(4, 101)
SOME = (4, 9, 30, 100)

# Those that round the time: to the nearest value of the type, of t, t / 1000 (twice), or sigma.
ROUNDED = {
    "t": (
        "hunyuan15",
        "hunyuan15_i2v",
        "hunyuan_image",
        "mochi",
        "easyanimate",
        "hunyuan_dit",
    ),
    "t, at times": ("hunyuan", "hunyuan_true_cfg", "hunyuan_i2v", "skyreels_v1"),
    "t / 1000": ("flux", "flux2", "chroma", "qwen_image", "nucleus_image"),
    "1 - t / 1000": ("ideogram4", "z_image", "lumina2"),
    "sigma": ("cosmos", "cosmos_v2w", "cosmos2_t2i", "cosmos2_v2w"),
    "t, before it is turned round": ("z_image_modular",),
    "sigma, before it is spread over the frames": ("cosmos25_transfer",),
}
STANDING_FOR = {names[0] for names in ROUNDED.values()}

# Pipelines that leave out the last step, and those that have no such number.
ONE_LESS = {"ltx_long"}
FIXED = {"ltx2_dfr", "helios_pyramid", "helios_pyramid_modular", "ideogram4_modular"}

# From 52 steps on their own scheduler fails: its first two timesteps are the same whole number.
LAST = dict.fromkeys(("cosmos25", "cosmos25_i2w", "cosmos25_transfer"), 51)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def converted(value, dtype):
    """A value of a call with its tensors in another precision."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(converted(entry, dtype) for entry in value)
    return value


def zeros(value, dtype):
    """An answer of a transformer with nothing in it."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value, dtype=dtype)
    if isinstance(value, list | tuple):
        return type(value)(zeros(entry, dtype) for entry in value)
    if isinstance(value, dict):
        return type(value)(**{name: zeros(entry, dtype) for name, entry in value.items()})
    return value


def shape_of(value):
    """What the shapes of an answer depend on."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return tuple((name, shape_of(entry)) for name, entry in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(shape_of, value))
    return value if isinstance(value, bool | str) else None


class Places(Observer):
    """Looks on at where an engine places the calls of its transformer.

    Attributes:
        walks: the steps of each walk, once a step; engines that take turns have them in common.
        length: steps in the table of the last call.
    """

    def __init__(self) -> None:
        self.walks: list[list[int]] = []
        self.length = 0

    def after_call(self, call, output):
        if call.context.restarted:
            self.walks.append([])
        if call.trajectory.begins_step:
            self.walks[-1].append(call.context.step)
        self.length = call.context.num_inference_steps


class Watched:
    """A tiny pipeline in half precision whose transformers answer without looking at their input.

    Attributes:
        case: the pipeline and its call.
    """

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype, self.case = name, dtype, CASES[name]()
        self.case.pipe.to(dtype)
        if name == "lucy_edit":  # it encodes its clip in single precision
            self.case.pipe.vae.float()
        self.case.kwargs = {k: converted(v, dtype) for k, v in self.case.kwargs.items()}
        # Those in single precision say what an answer looks like; some models need a GPU for half.
        models = find_transformers(CASES[name]().pipe)
        self.transformers = find_transformers(self.case.pipe)
        self.answers: dict[tuple, object] = {}
        for key, (transformer, host) in self.transformers.items():
            transformer.forward = self.forward_of(models[key][0], host)

    def run(self, **call) -> None:
        accelerate(self.case.pipe, policy=None, cache=None)
        self.engines = [engine_of(transformer) for transformer, _ in self.transformers.values()]
        apart = self.case.side_by_side
        self.places = [Places() for _ in (self.engines if apart else [0])]
        for engine, places in zip(self.engines, itertools.cycle(self.places)):
            engine.observer = places
        with torch.no_grad():
            self.case.run(**call)

    def forward_of(self, model, host) -> Callable:
        @wraps(model.forward)  # modular pipelines pass on what its signature names
        def forward(*args, **kwargs):
            key = (host.transformer, shape_of(args), shape_of(kwargs))
            if key not in self.answers:
                single = converted(args, torch.float32)
                named = {k: converted(v, torch.float32) for k, v in kwargs.items()}
                self.answers[key] = zeros(model(*single, **named), self.dtype)
            return self.answers[key]

        return forward

    def check(self, first: int = 0) -> None:
        """Every walk is through all steps in order."""
        plain = {reason for engine in self.engines for reason in engine.stats.plain}
        assert plain <= {ASIDE}
        for places in self.places:
            walks, length = places.walks, places.length
            whole = list(range(first, length - (self.name in ONE_LESS)))
            if len(self.engines) > len(self.places):  # two experts, one walk
                assert [step for walk in walks for step in walk] == whole
            else:
                assert walks and all(walk == whole for walk in walks), walks


def cases():
    """Every case in both types; those that round alike repeat the first of their kind."""
    for name in CASES:
        rounds = any(name in names for names in ROUNDED.values())
        first = name in (STANDING_FOR if rounds else CORE)
        marks = [] if first else [pytest.mark.repeats]
        for short, dtype in DTYPES.items():
            yield pytest.param(name, dtype, marks=marks, id=f"{name}-{short}")


@pytest.mark.parametrize(("name", "dtype"), list(cases()))
def test_every_call_is_placed_in_its_step(name, dtype):
    if Version(diffusers.__version__) < Version(SINCE.get(name, "0")):
        pytest.skip(f"needs diffusers {SINCE[name]}")
    watched = Watched(name, dtype)
    if name in FIXED:
        watched.run()
        watched.check()
        return
    for steps in EVERY if any(name in names for names in ROUNDED.values()) else SOME:
        if steps > LAST.get(name, steps):
            break
        watched.run(num_inference_steps=steps)
        start = watched.case.first
        if start and "strength" in watched.case.kwargs:
            start = steps - min(int(steps * watched.case.kwargs["strength"]), steps)
        watched.check(start)


def flow_matching(**config):
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


# The schedules of published models, and the shift of a usual size where it depends on the size.
SCHEDULES = {
    "FLUX.1 dev, 1024x1024": (
        "flux",
        lambda: flow_matching(use_dynamic_shifting=True, shift=3.0),
        1.15,
    ),
    "FLUX.1 dev, 256x256": (
        "flux",
        lambda: flow_matching(use_dynamic_shifting=True, shift=3.0),
        0.5,
    ),
    "FLUX.1 schnell": ("flux", lambda: flow_matching(shift=1.0), None),
    "FLUX.2 dev": ("flux2", lambda: flow_matching(use_dynamic_shifting=True, shift=3.0), 2.0),
    "Qwen-Image, 1328x1328": (
        "qwen_image",
        lambda: flow_matching(use_dynamic_shifting=True, shift_terminal=0.02),
        0.83,
    ),
    "Chroma": ("chroma", lambda: flow_matching(use_beta_sigmas=True), None),
    "Mochi": ("mochi", lambda: flow_matching(invert_sigmas=True), None),
    "HunyuanVideo 1.5, 480p": ("hunyuan15", lambda: flow_matching(shift=5.0), None),
    "HunyuanVideo 1.5, 720p": ("hunyuan15", lambda: flow_matching(shift=9.0), None),
    "HunyuanVideo, 17": ("hunyuan", lambda: flow_matching(shift=17.0), None),
    "Wan 2.1, 480p": ("wan_unipc", lambda: unipc(flow_shift=3.0), None),
    "Wan 2.1, 720p": ("wan_unipc", lambda: unipc(flow_shift=5.0), None),
}


def with_mu(scheduler, mu):
    """Have a scheduler take `mu` for the shift that its pipeline finds for its few pixels."""
    set_timesteps = scheduler.set_timesteps

    @wraps(set_timesteps)
    def shifted(*args, **kwargs):
        return set_timesteps(*args, **(kwargs | {"mu": mu}))

    scheduler.set_timesteps = shifted


USUAL = ("FLUX.1 dev, 1024x1024", "Mochi", "HunyuanVideo 1.5, 720p", "Wan 2.1, 720p")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(
    "model",
    [
        model if model in USUAL else pytest.param(model, marks=pytest.mark.repeats)
        for model in SCHEDULES
    ],
)
def test_the_schedules_of_published_models(model, dtype):
    name, scheduler, mu = SCHEDULES[model]
    watched = Watched(name, dtype)
    watched.case.pipe.scheduler = scheduler()
    if mu is not None:
        with_mu(watched.case.pipe.scheduler, mu)
    for steps in EVERY:
        watched.run(num_inference_steps=steps)
        watched.check()
