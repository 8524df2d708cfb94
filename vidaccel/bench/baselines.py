"""Other caches for Diffusers pipelines, a row each: how to turn one on and exactly off.

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

from vidaccel.errors import UnsupportedPipelineError
from vidaccel.hosts.registry import find_transformers

BaselineSetting = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """One cache of another library.

    Attributes:
        package: the import name of its library.
        enable: (pipe, setting) -> None; turns it on. It must be off.
        disable: turns it off, as its library says.
        ratios: the setting needs "mag_ratios" and "num_inference_steps", see `magnitude_ratios`.
    """

    package: str
    enable: Callable[[Any, BaselineSetting], None]
    disable: Callable[[Any], None]
    ratios: bool = False

    @property
    def unavailable(self) -> str | None:
        """Why it cannot be used here, or None when it can."""
        if find_spec(self.package) is None:
            return f"{self.package} is not installed: pip install {self.package.replace('_', '-')}"
        return None

    @contextmanager
    def enabled(self, pipe: Any, setting: BaselineSetting) -> Iterator[None]:
        """`pipe` with the cache on, and as it was before afterwards, whatever happens inside.

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


def magnitude_ratios(pipe: Any, calls: Sequence[dict[str, Any]]) -> list[float]:
    """What MagCache needs to know of a model, by its own calibration run.

    Args:
        pipe: a pipeline with one transformer.
        calls: arguments of the generations to measure, all of the same number of steps.

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
            pipe(**{**call, "output_type": "latent"})
        printed = re.findall(r"^\[[-0-9.e, ]+\]$", text.getvalue(), flags=re.MULTILINE)
        if not printed:
            raise UnsupportedPipelineError(
                f"MagCache measured no ratios of {type(pipe).__name__}: its blocks did not run "
                f"{steps} times"
            )
        found.append(ast.literal_eval(printed[0]))
    return [fmean(column) for column in zip(*found, strict=True)]


def _native(config: str) -> Callable[[Any, BaselineSetting], None]:
    """Turns on the cache of Diffusers that has this configuration class."""

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
    """The modules are named here: by default it looks for "attn" at the end of a name and does
    nothing on models whose attentions are called attn1 and attn2."""
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
    """`setting` takes the fields of DBCacheConfig, and "taylorseer_order" for its forecast."""
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


BASELINES: dict[str, Peer] = {
    "FirstBlockCache": Peer("diffusers", _native("FirstBlockCacheConfig"), _native_off),
    "MagCache": Peer("diffusers", _mag_cache, _native_off, ratios=True),
    "TaylorSeer": Peer("diffusers", _taylor_seer, _native_off),
    "TaylorSeer lite": Peer("diffusers", _taylor_seer_lite, _native_off),
    "SeaCache": Peer("diffusers", _native("SeaCacheConfig"), _native_off),
    "cache-dit": Peer("cache_dit", _cache_dit, _cache_dit_off),
}


def _transformers(pipe: Any) -> list[Any]:
    return [transformer for transformer, _ in find_transformers(pipe).values()]


def _silence(package: str) -> None:
    """Only errors from now on: it prints a dozen lines each time a cache goes on, and a warning
    each time it goes off. Every one of its loggers has a level of its own."""
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] == package:
            logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _captured() -> Iterator[io.StringIO]:
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
