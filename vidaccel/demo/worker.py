"""The worker behind the page: runs what settings ask for, and stays usable whatever happens."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vidaccel.api import accelerate, engines_of, restore
from vidaccel.clips.calling import parameters_of
from vidaccel.clips.fidelity import fidelity
from vidaccel.clips.generate import Run, generate
from vidaccel.clips.lesson import is_worth_learning, learning_from
from vidaccel.clips.load import call_arguments, steps_of
from vidaccel.clips.measurement import LearnedPlan, learned_plan
from vidaccel.clips.notes import notes_on_times, ran_on_cpu
from vidaccel.clips.video import Clip
from vidaccel.demo.eta import Eta
from vidaccel.demo.preview import Preview, data_uri
from vidaccel.demo.run_store import CLIPS
from vidaccel.demo.settings import OFF, Settings
from vidaccel.engine.stats import StepKind
from vidaccel.environment import environment
from vidaccel.errors import VidaccelError
from vidaccel.hosts.registry import find_transformers
from vidaccel.svg2.settings import SVG2

PREVIEW_EVERY = 0.25  # seconds, so that drawing does not slow down what is timed
ORIGINALS_BYTES = 2**30

OnProgress = Callable[..., None]  # takes fields of `vidaccel.demo.job_queue.Progress`
Save = Callable[[dict[str, Any], dict[str, Clip]], None]  # takes numbers and clips


class Stopped(Exception):
    """Ends a run from inside."""


class Worker:
    """Run one thing at a time on one pipeline, which is accelerated only meanwhile.

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
        self._originals: OrderedDict[Settings, Run] = OrderedDict()

    def load(self) -> Any:
        """Return the pipeline, which is loaded when it is needed first."""
        if self._pipe is None:
            pipe = self._load()
            config = next(iter(find_transformers(pipe).values()))[0].config
            self._preview = Preview(getattr(config, "out_channels", None) or config.in_channels)
            self._pipe = pipe
            self._loaded.set()
        return self._pipe

    def resolved(self, settings: Settings) -> Settings:
        """Return the settings with the pipeline's own defaults, as far as its call names them.

        Raises:
            ModelError: the pipeline cannot be loaded.
        """
        known = parameters_of(self.load())
        names = ("width", "height", "num_frames", "num_inference_steps")
        defaults = [getattr(known.get(name), "default", None) for name in names]
        given = {
            field: value
            for field, value in zip(("width", "height", "frames", "steps"), defaults, strict=True)
            if getattr(settings, field) is None and isinstance(value, int)
        }
        return settings.model_copy(update=given)

    def attention(self, patience: float = 120.0) -> Iterator[str]:
        """Say in words what becomes of this model's self-attention when it shall be sparse.

        Args:
            patience: seconds to wait for a model that is still being loaded.
        """
        if self._pipe is None:
            yield "The model is still being loaded; then this says whether it can."
            self._loaded.wait(patience)
        if self._pipe is not None:
            yield _attention_of(self._pipe)

    def run(
        self, settings: Settings, *, on_progress: OnProgress, stop: threading.Event, save: Save
    ) -> None:
        """Make the clips that settings ask for, the accelerated one first.

        Where nothing was measured or learned of such runs, the original comes first, and teaches.
        The original of a prompt, seed, size, number of steps and guidance is kept and not made
        again.

        Args:
            settings: what is asked for.
            on_progress: called with the fields of a job's progress that have changed.
            stop: when set, the run ends within a step.
            save: called with numbers and clips when there is a clip more.

        Raises:
            Stopped: it was stopped.
            Exception: as the pipeline does.
        """
        pipe = self.load()
        call = call_arguments(pipe, settings.call())
        clips: dict[str, Run] = {}
        about: dict[str, Any] = {"model": self.model, "environment": environment(), "notes": []}
        arguments = None if settings.acceleration == OFF else settings.acceleration_arguments()
        ran: LearnedPlan | None = None

        def generate_clip(phase: str, call: dict[str, Any]) -> Run:
            return self._generate(phase, call, settings.seed, on_progress, stop)

        def add_clip(name: str, run: Run) -> None:
            clips[name] = run
            if len(clips) == 2:
                on_progress(phase="comparing", step=0, steps=0, eta=None, preview="")
                runs = {name: clips[name] for name in ("original", "accelerated")}
                about["notes"] += notes_on_times(runs, on_cpu=ran_on_cpu(pipe))
            numbers = _numbers(clips, settings.fps)
            if ran is not None and len(clips) == 2:
                mean, faster = numbers["closeness"]["mean"], numbers["speedup"]
                psnr, ssim = mean["psnr"], mean.get("ssim")
                kept = ran.add(call, settings.seed, psnr=psnr, ssim=ssim, speedup=faster)
                about["notes"] += kept
            save(about | numbers, {name: clips[name].frames for name in CLIPS if name in clips})

        def add_original() -> None:
            original = self._originals.get(settings.original())
            about["original_kept"] = original is not None
            if original is None:
                with learning_from(pipe, call, policy) as lesson:
                    original = generate_clip("original", call)
                original, notes = lesson.without(original)
                about["notes"] += notes
                self._keep(settings.original(), original)
            add_clip("original", original)

        policy = "auto" if arguments is None else arguments["policy"]
        compared = arguments is None or settings.compare
        try:
            if arguments is not None:
                self._prepare(settings, arguments, call, generate_clip)
            # An original that teaches comes first: the accelerated clip uses what it has taught.
            teaches = (
                compared
                and settings.original() not in self._originals
                and is_worth_learning(pipe, call, policy)
            )
            if teaches or arguments is None:
                add_original()
            if arguments is not None:
                accelerate(pipe, **arguments)
                accelerated = generate_clip("accelerated", call)
                ran = learned_plan(pipe)
                restore(pipe)
                add_clip("accelerated", accelerated)
            if compared and "original" not in clips:
                add_original()
        except BaseException:
            # Offloaded parts stay where an exception finds them.
            pipe.maybe_free_model_hooks()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise
        finally:
            restore(pipe)

    def _prepare(
        self,
        settings: Settings,
        arguments: dict[str, Any],
        call: dict[str, Any],
        generate_clip: Callable[[str, dict[str, Any]], Run],
    ) -> None:
        """Refuse what cannot be before any work, and warm up where a comparison follows."""
        accelerate(self._pipe, **arguments)
        restore(self._pipe)
        shape = tuple(call.get(name) for name in ("height", "width", "num_frames"))
        if settings.compare and shape not in self._warm:
            # Neither side of a comparison should pay for the first run of a shape.
            generate_clip("warm-up", {**call, "num_inference_steps": 2})
            self._warm.add(shape)

    def _keep(self, key: Settings, run: Run) -> None:
        """Remember an original, and forget the oldest ones when they take too much memory."""
        self._originals[key] = run
        while (
            len(self._originals) > 1
            and sum(kept.frames.nbytes for kept in self._originals.values()) > ORIGINALS_BYTES
        ):
            self._originals.popitem(last=False)

    def _generate(
        self,
        phase: str,
        call: dict[str, Any],
        seed: int,
        on_progress: OnProgress,
        stop: threading.Event,
    ) -> Run:
        """Make one clip, and learn the colours of previews from it."""
        pipe, preview = self._pipe, self._preview
        assert preview is not None
        steps = steps_of(pipe, call)
        on_progress(phase=phase, step=0, steps=steps, timeline="", eta=None, preview="")
        follower = _Follower(pipe, steps, preview, on_progress, stop)
        with _before_each_call(pipe, follower.on_call):
            run = generate(pipe, call, seed=seed, progress=False, on_step=follower.on_step)
        preview.learn(follower.latents, run.frames)
        return run


class _Follower:
    """Follow one generation: publish its progress, and end it when it is stopped.

    Attributes:
        latents: the latents after the last step that has ended.
    """

    def __init__(
        self,
        pipe: Any,
        steps: int,
        preview: Preview,
        on_progress: OnProgress,
        stop: threading.Event,
    ) -> None:
        self.latents: Any = None
        self._engines = list(engines_of(pipe).values())
        self._steps = steps
        self._preview = preview
        self._on_progress = on_progress
        self._stop = stop
        self._eta = Eta(steps)
        self._drawn = 0.0

    def on_call(self, *_: Any) -> None:
        """Take note that a transformer is called."""
        if self._stop.is_set():
            raise Stopped
        self._eta.start()

    def on_step(self, step: int, latents: Any) -> None:
        """Publish that a step has ended, with a preview now and then."""
        self.latents = latents
        timeline = "".join(engine.stats.timeline() for engine in self._engines)
        self._eta.end_step(StepKind(timeline[-1:] or StepKind.COMPUTED))
        generation = self._engines[0].generation if self._engines else None
        plan = None if generation is None else generation.plan
        computed = None if plan is None else [plan.computes(s) for s in range(self._steps)]
        changes: dict[str, Any] = {
            "step": step + 1,
            "timeline": timeline,
            "eta": self._eta.seconds_left(computed),
        }
        if time.perf_counter() - self._drawn > PREVIEW_EVERY:
            self._drawn = time.perf_counter()
            frames = self._preview.frames(latents)
            if frames is not None:
                changes["preview"] = data_uri(frames)
        self._on_progress(**changes)
        if self._stop.is_set():  # after the last step there is no other call to end it at
            raise Stopped


def in_words(error: Exception, settings: Settings) -> str:
    """Return an error as one line that a user of the page can act on."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, VidaccelError):
        return text
    if isinstance(error, torch.OutOfMemoryError):
        size = f"{settings.width}x{settings.height}" if settings.width else "this size"
        return f"the GPU has too little memory for {size}: take a smaller size or fewer frames"
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def _attention_of(pipe: Any) -> str:
    # Only here, since Triton and Diffusers' attention take seconds to import.
    from vidaccel.svg2.support import gpu_here, gpu_of, why_dense, why_not_on

    for transformer, host in find_transformers(pipe).values():
        reason = why_dense(transformer, host)
        if not reason and (gpu := gpu_of(transformer) or gpu_here()) is not None:
            reason = why_not_on(gpu, transformer, host)
        if reason:
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


@contextmanager
def _before_each_call(pipe: Any, on_call: Callable[..., None]) -> Iterator[None]:
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


def _numbers(clips: dict[str, Run], fps: float) -> dict[str, Any]:
    """Return what was measured on one or two clips, as the fields of a run's result."""
    result: dict[str, Any] = {
        "seconds": {name: run.seconds for name, run in clips.items()},
        "denoising_seconds": {name: run.denoising_seconds for name, run in clips.items()},
        "cpu_seconds": {name: run.cpu_seconds for name, run in clips.items()},
    }
    if "accelerated" in clips:
        result["report"] = clips["accelerated"].report
    if len(clips) == 2:
        fast, plain = clips["accelerated"], clips["original"]
        result["speedup"] = plain.seconds / fast.seconds
        # Its name in the files.
        result["closeness"] = fidelity(plain.frames, fast.frames, fps=fps)
    return result
