"""The pipeline behind a page: runs what settings ask for, and stays usable whatever happens."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch

from vidaccel.api import accelerate, engines_of, restore
from vidaccel.clips import generate as g
from vidaccel.clips.compare import fidelity
from vidaccel.clips.video import Clip
from vidaccel.demo.eta import Countdown
from vidaccel.demo.preview import Preview, data_uri
from vidaccel.demo.settings import OFF, Settings
from vidaccel.environment import environment
from vidaccel.errors import VidaccelError
from vidaccel.hosts.registry import find_transformers
from vidaccel.svg2.settings import SVG2

PREVIEW_EVERY = 0.25  # seconds, so that looking does not slow down what is timed
ORIGINALS_BYTES = 2**30

Tell = Callable[..., None]
Save = Callable[[dict[str, Any], dict[str, Clip]], None]


class Stopped(Exception):
    """Ends a run from inside."""


class Worker:
    """RunStore one thing at a time on one pipeline, which is accelerated only meanwhile.

    Args:
        load: gives the pipeline; raises ModelError.
        model: its name, for the results.
    """

    def __init__(self, load: Callable[[], Any], model: str) -> None:
        self.model = model
        self._load = load
        self._pipe: Any = None
        self._loaded = threading.Event()
        self._preview: Preview | None = None
        self._warm: set[tuple[Any, ...]] = set()
        self._originals: OrderedDict[Settings, g.Run] = OrderedDict()

    def load(self) -> Any:
        """The pipeline, loaded when it is needed first."""
        if self._pipe is None:
            pipe = self._load()
            config = next(iter(find_transformers(pipe).values()))[0].config
            self._preview = Preview(getattr(config, "out_channels", None) or config.in_channels)
            self._pipe = pipe
            self._loaded.set()
        return self._pipe

    def resolved(self, settings: Settings) -> Settings:
        """The settings with what the pipeline takes by itself, as far as its call tells.

        Raises:
            ModelError: it cannot be loaded.
        """
        known = signature(type(self.load()).__call__).parameters
        names = ("width", "height", "num_frames", "num_inference_steps")
        defaults = [getattr(known.get(name), "default", None) for name in names]
        given = {
            field: value
            for field, value in zip(("width", "height", "frames", "steps"), defaults, strict=True)
            if getattr(settings, field) is None and isinstance(value, int)
        }
        return settings.model_copy(update=given)

    def attention(self, patience: float = 120.0) -> Iterator[str]:
        """In words, what becomes of this model's self-attention when it shall be sparse.

        Args:
            patience: seconds to wait for a model that is still being loaded.
        """
        if self._pipe is None:
            yield "The model is still being loaded; then this says whether it can."
            self._loaded.wait(patience)
        if self._pipe is not None:
            yield self._attention_of(self._pipe)

    @staticmethod
    def _attention_of(pipe: Any) -> str:
        # Only here, since Triton and Diffusers' attention take seconds to import.
        from vidaccel.svg2.runner import why_dense

        for transformer, host in find_transformers(pipe).values():
            if reason := why_dense(transformer, host):
                return f"Attention stays dense with this model: {reason}."
        if not torch.cuda.is_available():
            return (
                "There is no GPU here, so auto leaves attention dense. SVG2 runs without one and "
                "shows what it does to the clip, but saves no time."
            )
        return (
            f"Sequences shorter than {SVG2.min_tokens} tokens stay dense, since they would gain "
            "nothing; SVG2 can set another length."
        )

    def perform(self, settings: Settings, *, tell: Tell, stop: threading.Event, save: Save) -> None:
        """Make the clips that settings ask for, the accelerated one first.

        The original of a prompt, seed, size, number of steps and guidance is kept and not made
        again.

        Args:
            settings: of the run.
            tell: called with fields of `vidaccel.demo.job_queue.Progress` that have changed.
            stop: when set, the run ends within a step.
            save: called with numbers and clips when there is a clip more.

        Raises:
            Stopped: it was stopped.
            Exception: as the pipeline does.
        """
        pipe = self.load()
        call = g.call_arguments(pipe, settings.call())
        clips: dict[str, g.Run] = {}
        about = {"model": self.model, "environment": environment()}

        def clip_made(name: str, run: g.Run) -> None:
            clips[name] = run
            save(about | _numbers(clips), {name: run.frames for name, run in clips.items()})

        def generate(phase: str, call: dict[str, Any]) -> g.Run:
            return self._generate(phase, call, settings.seed, tell, stop)

        try:
            if settings.acceleration != OFF:
                arguments = settings.acceleration_arguments()
                accelerate(pipe, **arguments)  # what cannot be is refused before any work
                restore(pipe)
                shape = tuple(call.get(name) for name in ("height", "width", "num_frames"))
                if settings.compare and shape not in self._warm:
                    # Neither side of a comparison should pay for the first run of a shape.
                    generate("warm-up", {**call, "num_inference_steps": 2})
                    self._warm.add(shape)
                accelerate(pipe, **arguments)
                clip_made("accelerated", generate("accelerated", call))
                restore(pipe)
            if settings.acceleration == OFF or settings.compare:
                original = self._originals.get(settings.original())
                about["original_kept"] = original is not None
                if original is None:
                    original = generate("original", call)
                    self._keep(settings.original(), original)
                tell(phase="comparing", step=0, steps=0, eta=None, preview="")
                clip_made("original", original)
        except BaseException:
            # Offloaded parts stay where an exception finds them.
            pipe.maybe_free_model_hooks()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise
        finally:
            restore(pipe)

    def _keep(self, key: Settings, run: g.Run) -> None:
        """Remember an original, and forget the oldest ones when they take too much memory."""
        self._originals[key] = run
        while (
            len(self._originals) > 1
            and sum(kept.frames.nbytes for kept in self._originals.values()) > ORIGINALS_BYTES
        ):
            self._originals.popitem(last=False)

    def _generate(
        self, phase: str, call: dict[str, Any], seed: int, tell: Tell, stop: threading.Event
    ) -> g.Run:
        pipe, preview = self._pipe, self._preview
        assert preview is not None
        steps = g.steps_of(pipe, call)
        tell(phase=phase, step=0, steps=steps, timeline="", eta=None, preview="")
        engines = list(engines_of(pipe).values())
        countdown = Countdown(steps)
        drawn = 0.0
        last: Any = None

        def on_call(*_: Any) -> None:
            if stop.is_set():
                raise Stopped
            countdown.start()

        def on_step(step: int, latents: Any) -> None:
            """Tell the progress, with a preview now and then."""
            nonlocal drawn, last
            last = latents
            timeline = "".join(engine.stats.timeline() for engine in engines)
            countdown.lap(timeline[-1:] or "C")
            plan = engines[0].plan if engines else None
            computed = None if plan is None else [plan.computes(s) for s in range(steps)]
            news = {"step": step + 1, "timeline": timeline, "eta": countdown.left(computed)}
            if time.perf_counter() - drawn > PREVIEW_EVERY:
                drawn = time.perf_counter()
                frames = preview.frames(latents)
                if frames is not None:
                    news["preview"] = data_uri(frames)
            tell(**news)
            if stop.is_set():  # after the last step there is no other call to end it at
                raise Stopped

        with _hooked(pipe, on_call):
            run = g.generate(pipe, call, seed=seed, progress=False, on_step=on_step)
        preview.learn(last, run.frames)
        return run


def in_words(error: Exception, settings: Settings) -> str:
    """What went wrong, in one line that a user of the page can act on."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, VidaccelError):
        return text
    if isinstance(error, torch.OutOfMemoryError):
        size = f"{settings.width}x{settings.height}" if settings.width else "this size"
        return f"the GPU has too little memory for {size}: take a smaller size or fewer frames"
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


@contextmanager
def _hooked(pipe: Any, on_call: Callable[..., None]) -> Iterator[None]:
    """Call a function before every call of the transformers, the first of all hooks."""
    handles = [
        transformer.register_forward_pre_hook(on_call, prepend=True)
        for transformer, _ in find_transformers(pipe).values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _numbers(clips: dict[str, g.Run]) -> dict[str, Any]:
    """What is told about one or two clips, without the clips."""
    result: dict[str, Any] = {
        "seconds": {name: run.seconds for name, run in clips.items()},
        "denoising_seconds": {name: run.denoising_seconds for name, run in clips.items()},
    }
    if "accelerated" in clips:
        result["report"] = clips["accelerated"].report
    if len(clips) == 2:
        fast, plain = clips["accelerated"], clips["original"]
        result["speedup"] = plain.seconds / fast.seconds
        result["fidelity"] = fidelity(plain.frames, fast.frames)
    return result
