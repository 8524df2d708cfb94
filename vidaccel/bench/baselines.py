"""Turn caches of other libraries for Diffusers pipelines on, and exactly off.

They are here to be measured beside vidaccel (`vidaccel bench quality`), each as its own documents
say, with the settings that make it work on every model: see the rows.
"""

import ast
import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import fmean
from typing import Any

import torch

from vidaccel.clips.generate import latents_of
from vidaccel.errors import UnsupportedPipelineError
from vidaccel.hosts.registry import find_transformers

# Arguments of the configuration of another library's cache.
BaselineSetting = dict[str, Any]


@dataclass(frozen=True)
class Baseline:
    """One cache of another library.

    Attributes:
        package: the import name of its library.
        enable: function of a pipeline and a setting that turns it on. It must be off.
        disable: function of a pipeline that turns it off, as its library says.
        ratios: the setting needs "mag_ratios" and "num_inference_steps", see `magnitude_ratios`.
    """

    package: str
    enable: Callable[[Any, BaselineSetting], None]
    disable: Callable[[Any], None]
    ratios: bool = False

    @property
    def unavailable(self) -> str | None:
        """The reason why it cannot be used here, or None when it can."""
        if find_spec(self.package) is None:
            return f"{self.package} is not installed: pip install {self.package.replace('_', '-')}"
        return None

    @contextmanager
    def enabled(self, pipe: Any, setting: BaselineSetting) -> Iterator[None]:
        """Turn the cache on, and leave the pipeline as it was, whatever happens inside.

        Raises:
            UnsupportedPipelineError: it is not installed or does not work on this pipeline.
        """
        if self.unavailable is not None:
            raise UnsupportedPipelineError(self.unavailable)
        with _leaving_no_trace(pipe):
            self.enable(pipe, setting)
            try:
                yield
            finally:
                self.disable(pipe)


def magnitude_ratios(pipe: Any, calls: Sequence[dict[str, Any]], *, seed: int = 0) -> list[float]:
    """Measure what MagCache needs to know of a model, by its own calibration run.

    Args:
        pipe: a pipeline with one transformer.
        calls: arguments of the generations to measure, all of the same number of steps.
        seed: seed of their noise.

    Returns:
        One ratio per step, the mean over the generations. Of pipelines that call the model once
        per guidance branch the first branch counts, as Diffusers advises.

    Raises:
        UnsupportedPipelineError: the calibration told no ratios.
    """
    found = []
    for call in calls:
        steps = call["num_inference_steps"]
        setting = {"calibrate": True, "num_inference_steps": steps}
        # The calibration only prints what it found.
        with BASELINES["MagCache"].enabled(pipe, setting), _captured() as text:
            latents_of(pipe, call, seed)
        printed = re.findall(r"^\[[-0-9.e, ]+\]$", text.getvalue(), flags=re.MULTILINE)
        if not printed:
            raise UnsupportedPipelineError(
                f"MagCache measured no ratios of {type(pipe).__name__}: its blocks did not run "
                f"{steps} times"
            )
        found.append(ast.literal_eval(printed[0]))
    return [fmean(column) for column in zip(*found, strict=True)]


def _native(config: str) -> Callable[[Any, BaselineSetting], None]:
    """Return what turns on the cache of Diffusers that has this configuration class."""

    def enable(pipe: Any, setting: BaselineSetting) -> None:
        import diffusers

        if not hasattr(diffusers, config):
            raise UnsupportedPipelineError(f"Diffusers {diffusers.__version__} has no {config}")
        for transformer in _transformers(pipe):
            transformer.enable_cache(getattr(diffusers, config)(**setting))

    return enable


def _native_off(pipe: Any) -> None:
    for transformer in _transformers(pipe):
        if getattr(transformer, "is_cache_enabled", False):
            transformer.disable_cache()


def _mag_cache(pipe: Any, setting: BaselineSetting) -> None:
    if len(_transformers(pipe)) > 1:
        raise UnsupportedPipelineError(
            "MagCache counts the steps of each transformer by itself and cannot run on two"
        )
    _native("MagCacheConfig")(pipe, setting)


def _taylor_seer(pipe: Any, setting: BaselineSetting) -> None:
    """Turn TaylorSeer on for modules that are named here.

    By default it looks for "attn" at the end of a name and does nothing on models whose attentions
    are called attn1 and attn2.
    """
    modules = r".*blocks\.\d+\.(attn\d*|ff\w*)"
    for transformer in _transformers(pipe):
        if not any(re.fullmatch(modules, name) for name, _ in transformer.named_modules()):
            raise UnsupportedPipelineError(
                f"TaylorSeer finds no attention in {type(transformer).__name__}"
            )
    _native("TaylorSeerCacheConfig")(
        pipe, {"cache_identifiers": [modules], "taylor_factors_dtype": torch.float32, **setting}
    )


def _taylor_seer_lite(pipe: Any, setting: BaselineSetting) -> None:
    for transformer in _transformers(pipe):
        if not hasattr(transformer, "proj_out"):
            raise UnsupportedPipelineError(
                f"TaylorSeer's lite mode needs a proj_out, which {type(transformer).__name__} has "
                "not"
            )
    _native("TaylorSeerCacheConfig")(
        pipe, {"use_lite_mode": True, "taylor_factors_dtype": torch.float32, **setting}
    )


def _cache_dit(pipe: Any, setting: BaselineSetting) -> None:
    """Turn cache-dit on with fields of DBCacheConfig, and "taylorseer_order" for its forecast."""
    import cache_dit

    _silence("cache_dit")
    order = setting.get("taylorseer_order", 0)
    fields = {name: value for name, value in setting.items() if name != "taylorseer_order"}
    forecast = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    cache_dit.enable_cache(
        pipe, cache_config=cache_dit.DBCacheConfig(**fields), calibrator_config=forecast
    )


def _cache_dit_off(pipe: Any) -> None:
    import cache_dit

    cache_dit.disable_cache(pipe)


BASELINES: dict[str, Baseline] = {
    "FirstBlockCache": Baseline("diffusers", _native("FirstBlockCacheConfig"), _native_off),
    "MagCache": Baseline("diffusers", _mag_cache, _native_off, ratios=True),
    "TaylorSeer": Baseline("diffusers", _taylor_seer, _native_off),
    "TaylorSeer lite": Baseline("diffusers", _taylor_seer_lite, _native_off),
    "SeaCache": Baseline("diffusers", _native("SeaCacheConfig"), _native_off),
    "cache-dit": Baseline("cache_dit", _cache_dit, _cache_dit_off),
}


# (threshold on the relative change of the probe, warm-up steps, longest run of reused steps or -1
# for any) of block caches. The one with 0.12 is what cache-dit's own command line starts from.
BLOCK_CACHE_SETTINGS = ((0.05, 8, -1), (0.12, 8, 3), (0.2, 4, 4), (0.4, 4, -1))

# (probe blocks, corrector blocks)
BLOCK_CACHE_LAYOUTS = ((1, 0), (1, 1), (2, 2))


@dataclass(frozen=True)
class BaselineMethod:
    """A baseline as it is measured.

    Attributes:
        baseline: its name in BASELINES.
        settings: settings from careful to fast.
    """

    baseline: str
    settings: tuple[BaselineSetting, ...]


def _cache_dit_method(probe: int, corrector: int, order: int) -> BaselineMethod:
    """Return cache-dit with one layout of its blocks."""
    return BaselineMethod(
        "cache-dit",
        tuple(
            {
                "Fn_compute_blocks": probe,
                "Bn_compute_blocks": corrector,
                "residual_diff_threshold": threshold,
                "max_warmup_steps": warmup,
                "max_continuous_cached_steps": run,
                "taylorseer_order": order,
            }
            for threshold, warmup, run in BLOCK_CACHE_SETTINGS
        ),
    )


BASELINE_METHODS: dict[str, BaselineMethod] = {
    "FirstBlockCache": BaselineMethod(
        "FirstBlockCache", tuple({"threshold": t} for t in (0.03, 0.05, 0.08, 0.12, 0.3))
    ),
    "MagCache": BaselineMethod(
        "MagCache",
        tuple(
            {"threshold": threshold, "max_skip_steps": skip, "retention_ratio": retention}
            for threshold, skip, retention in (
                (0.02, 1, 0.2),
                (0.02, 2, 0.2),
                (0.06, 3, 0.2),
                (0.12, 4, 0.2),
                (0.24, 5, 0.1),
                (0.8, 10, 0.1),
            )
        ),
    ),
    "TaylorSeer": BaselineMethod(
        "TaylorSeer",
        (
            {"cache_interval": 2, "disable_cache_before_step": 24},
            *({"cache_interval": n} for n in (2, 4, 6)),
        ),
    ),
    "TaylorSeer lite": BaselineMethod(
        "TaylorSeer lite",
        (
            {"cache_interval": 2, "disable_cache_before_step": 24},
            *({"cache_interval": n} for n in (2, 3, 5, 8)),
        ),
    ),
    "SeaCache": BaselineMethod(
        "SeaCache",
        tuple(
            {"threshold": threshold, "max_consecutive_cached": run}
            for threshold, run in (
                (0.03, 1),
                (0.06, 1),
                (0.1, 2),
                (0.15, 4),
                (0.5, 5),
                (1.0, 6),
                (2.0, 8),
            )
        ),
    ),
    **{
        f"cache-dit F{probe}B{corrector}{' TaylorSeer' if order else ''}": _cache_dit_method(
            probe, corrector, order
        )
        for probe, corrector in BLOCK_CACHE_LAYOUTS
        for order in (0, 1)
    },
}


def _transformers(pipe: Any) -> list[Any]:
    return [transformer for transformer, _ in find_transformers(pipe).values()]


def _silence(package: str) -> None:
    """Let a package log errors only.

    cache-dit prints a dozen lines each time it goes on, and a warning each time it goes off; every
    one of its loggers has a level of its own.
    """
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] == package:
            logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _captured() -> Iterator[io.StringIO]:
    """Collect what is printed."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        yield text


@contextmanager
def _leaving_no_trace(pipe: Any) -> Iterator[None]:
    """Put back every attribute of the pipeline, its class and its transformers' modules.

    The libraries undo what they replace, but leave wrapped methods and marks behind, on the class
    of the pipeline too; with those the next one refuses to start, or the pipeline is no longer the
    one that the baseline was measured with.
    """
    owners = [pipe, *(module for each in _transformers(pipe) for module in each.modules())]
    before = [dict(vars(owner)) for owner in owners]
    # A list of blocks that was replaced for a while comes back as the last of its siblings.
    children = [dict(owner._modules) for owner in owners[1:]]
    cls = type(pipe)
    of_class = dict(vars(cls))
    try:
        yield
    finally:
        for owner, attributes in zip(owners, before, strict=True):
            vars(owner).clear()
            vars(owner).update(attributes)
        for owner, modules in zip(owners[1:], children, strict=True):
            owner._modules.clear()
            owner._modules.update(modules)
        for name in set(vars(cls)) - set(of_class):
            delattr(cls, name)
        for name, value in of_class.items():
            if vars(cls)[name] is not value:
                setattr(cls, name, value)
