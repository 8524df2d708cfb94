"""The controls of the page, and what they say as settings."""

import re
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from vidaccel.demo import html
from vidaccel.demo.fields import CACHE_DEFAULTS, CACHE_FIELDS, SPARSE_FIELDS, number_field
from vidaccel.demo.settings import (
    ACCELERATIONS,
    CUSTOM,
    MAX_SEED,
    OFF,
    PRECISIONS,
    Limits,
    Settings,
    Sparse,
    policy_of_text,
    with_one_plan,
)
from vidaccel.errors import PolicyError, SettingsError
from vidaccel.plans.policy import CachePolicy

SIZE = re.compile(r"\s*(\d{1,5})\s*x\s*(\d{1,5})\s*")


class Controls:
    """One column of controls, made inside a `gr.Blocks`.

    Args:
        defaults: what they show at first.
        limits: shown beside the numbers; `vidaccel.demo.job_queue` enforces them.
        sizes: proposed sizes, as in 832x480.
        on_attention: says what becomes of the attention of this model, and again when it knows.

    Attributes:
        generate, stop: the buttons.
        seed: the field that a run with a new seed fills in.
        accordions: those that open and close, by their element ids.
        attention_note: says what becomes of the attention of this model; see `describe_attention`.
    """

    def __init__(
        self,
        defaults: Settings,
        limits: Limits,
        sizes: list[str],
        on_attention: Callable[[], Iterator[str]],
    ) -> None:
        self._on_attention = on_attention
        self._prompt = gr.Textbox(
            defaults.prompt, label="Prompt", lines=2, max_length=4000, elem_id="prompt"
        )
        self._acceleration = gr.Radio(
            list(ACCELERATIONS),
            value=defaults.acceleration,
            label="Acceleration",
            info="quality about 2 times, balanced 3, fast 5 as fast; custom: what is set below",
            elem_id="acceleration",
        )
        self._compare = gr.Checkbox(
            defaults.compare, label="Also make the original, and compare", elem_id="compare"
        )
        with gr.Row():
            self.generate = gr.Button(
                "Generate", variant="primary", min_width=120, elem_id="generate"
            )
            self.stop = gr.Button(
                "Stop", variant="stop", interactive=False, min_width=120, elem_id="stop"
            )
        with gr.Column(elem_id="more"):
            with gr.Row():
                self.seed = gr.Number(
                    defaults.seed,
                    label="Seed",
                    precision=0,
                    minimum=0,
                    min_width=120,
                    elem_id="seed",
                )
                self._randomise = gr.Checkbox(
                    False, label="New seed each time", min_width=120, elem_id="randomise"
                )
            with gr.Accordion("Size, steps, guidance", open=False, elem_id="details") as details:
                self._build_details(defaults, limits, sizes)
            with gr.Accordion("Custom acceleration", open=False, elem_id="custom") as self._custom:
                self._build_policy()
                self._build_cache()
                self._build_attention()
                self._precision = gr.Radio(
                    list(PRECISIONS),
                    value=OFF,
                    label="Low precision",
                    info="linear layers of the blocks in 8 or 4 bits: less memory, and int8 is "
                    "faster on a GPU in large models",
                    elem_id="precision",
                )
                self._connect()
        self.accordions = {"details": details, "custom": self._custom}

    def _build_details(self, defaults: Settings, limits: Limits, sizes: list[str]) -> None:
        self._negative = gr.Textbox(
            defaults.negative_prompt, label="Negative prompt", max_length=4000
        )
        self._size = gr.Dropdown(
            sizes,
            value=_size_text(defaults),
            label="Size",
            info=f"width x height; no more pixels than {limits.width}x{limits.height}",
            allow_custom_value=True,
            elem_id="size",
        )
        with gr.Row():
            self._frames = number_field("Frames", defaults.frames, f"up to {limits.frames}")
            self._steps = number_field("Steps", defaults.steps, f"up to {limits.steps}")
        with gr.Row():
            self._guidance = number_field("Guidance", defaults.guidance, "0 to 100", whole=False)
            self._fps = number_field("Frames per second", defaults.fps, "of the files")
        gr.Markdown("Empty fields are left to the model.", elem_classes="va-muted")

    def _build_policy(self) -> None:
        self._policy = gr.State(None)
        self._steps_text = gr.Textbox(
            "auto",
            label="Steps to compute",
            info="auto, all, every N, or a list such as 0,1,5; a policy file below comes first",
            max_length=6000,
            elem_id="plan",
        )
        self._file = gr.File(
            label="Policy file", file_types=[".json"], height=150, elem_id="policy"
        )
        self._budget = gr.Slider(
            1, 2, 1, step=1, label="Steps that are computed", visible=False, elem_id="budget"
        )
        self._curve = gr.HTML(elem_id="curve")

    def _build_cache(self) -> None:
        self._with_cache = gr.Checkbox(
            False,
            label="DBCache: watch the first blocks, compute a step when they change",
            elem_id="dbcache",
        )
        with gr.Row():
            self._cache = [
                number_field(
                    label,
                    CACHE_DEFAULTS[name],
                    info,
                    whole=name != "threshold",
                    name=name,
                    min_width=140,
                )
                for name, (label, info) in CACHE_FIELDS.items()
            ]

    def _build_attention(self) -> None:
        self._attention = gr.Radio(
            [("off", "off"), ("auto", "auto"), ("SVG2", "svg2")],
            value="auto",
            label="Sparse attention",
            info="SVG2: most of each video self-attention is left out; clusters by the number of "
            "tokens",
            elem_id="attention",
        )
        self.attention_note = gr.HTML(elem_id="attention-note")
        with gr.Row(visible=False) as self._sparse_row:
            self._sparse = [
                number_field(
                    label,
                    Sparse().top_p if name == "top_p" else None,
                    info,
                    whole=name != "top_p",
                    name=name,
                    min_width=140,
                )
                for name, (label, info) in SPARSE_FIELDS.items()
            ]

    def _connect(self) -> None:
        """Connect the events of the custom controls with their handlers."""
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        drawn = [self._policy, self._budget, self._curve]
        self._attention.change(
            lambda choice: gr.update(visible=choice == "svg2"),
            self._attention,
            self._sparse_row,
            **quiet,
        )
        self._custom.expand(self.describe_attention, None, self.attention_note, **quiet)
        self._file.upload(self._read_policy, self._file, [*drawn, self._acceleration], **quiet)
        self._file.clear(lambda: (None, gr.update(visible=False), ""), None, drawn, **quiet)
        self._budget.change(self._draw, [self._policy, self._budget], self._curve, **quiet)
        # Only when a visitor chooses; what else changes it opens the accordion itself, in `show`.
        # One event after the other: Gradio now and then keeps a stream open for two at once.
        self._acceleration.input(
            lambda choice: gr.update(open=choice == CUSTOM),
            self._acceleration,
            self._custom,
            **quiet,
        ).then(self.describe_attention, None, self.attention_note, **quiet)

    def describe_attention(self) -> Iterator[str]:
        """Say what becomes of the attention of this model, and again when more is known."""
        yield from map(html.note, self._on_attention())

    @property
    def inputs(self) -> list[Any]:
        """The components whose values `settings` takes."""
        return [
            self._prompt,
            self._negative,
            self.seed,
            self._randomise,
            self._size,
            self._frames,
            self._steps,
            self._guidance,
            self._fps,
            self._acceleration,
            self._compare,
            self._steps_text,
            self._policy,
            self._budget,
            self._with_cache,
            *self._cache,
            self._attention,
            *self._sparse,
            self._precision,
        ]

    @property
    def blank(self) -> list[Any]:
        """The numbers left to the model at first; Gradio shows them as 0 until an update."""
        return [
            field for field in self.inputs if isinstance(field, gr.Number) and field.value is None
        ]

    @property
    def outputs(self) -> list[Any]:
        """The components that `show` changes."""
        return [*self.inputs, self._curve, self._custom, self.attention_note]

    def settings(self, values: list[Any]) -> Settings:
        """Return what the controls say, with a new seed if one is asked for.

        Args:
            values: those of `inputs`, in their order.

        Raises:
            SettingsError: something is out of its range.
        """
        given = dict(zip(self.inputs, values, strict=True))
        match = SIZE.fullmatch(given[self._size] or "x")
        if match is None and given[self._size]:
            raise SettingsError(f"size: expected such as 832x480, found {given[self._size]!r}")
        policy: CachePolicy | None = given[self._policy]
        policy_text = (given[self._steps_text] or "").strip() or "auto"
        if policy is not None:
            policy_text = with_one_plan(policy, _nearest(policy, given[self._budget])).to_json()
        cache = dict(zip(CACHE_FIELDS, (given[field] for field in self._cache), strict=True))
        sparse = dict(zip(SPARSE_FIELDS, (given[field] for field in self._sparse), strict=True))
        if sparse["top_p"] is None:
            sparse.pop("top_p")
        seed = secrets.randbelow(MAX_SEED + 1) if given[self._randomise] else given[self.seed]
        return Settings.of(
            {
                "prompt": (given[self._prompt] or "").strip(),
                "negative_prompt": (given[self._negative] or "").strip(),
                "seed": 0 if seed is None else seed,
                "width": int(match[1]) if match else None,
                "height": int(match[2]) if match else None,
                "frames": given[self._frames],
                "steps": given[self._steps],
                "guidance": given[self._guidance],
                "fps": given[self._fps] or 16,
                "acceleration": given[self._acceleration],
                "compare": bool(given[self._compare]),
                "policy": policy_text,
                "cache": cache if given[self._with_cache] else None,
                "attention": given[self._attention],
                "svg2": sparse if given[self._attention] == "svg2" else {},
                "precision": given[self._precision],
            }
        )

    def show(self, settings: Settings) -> dict[Any, Any]:
        """Return the updates that make the controls say `settings`."""
        policy = None
        if settings.policy.startswith("{"):
            policy = policy_of_text(settings.policy)
        cache = settings.cache.model_dump() if settings.cache is not None else {}
        return {
            self._prompt: settings.prompt,
            self._negative: settings.negative_prompt,
            self.seed: settings.seed,
            self._randomise: False,
            self._size: _size_text(settings),
            self._frames: settings.frames,
            self._steps: settings.steps,
            self._guidance: settings.guidance,
            self._fps: settings.fps,
            self._acceleration: settings.acceleration,
            self._compare: settings.compare,
            self._steps_text: "auto" if policy is not None else settings.policy,
            self._policy: policy,
            self._budget: self._slider(policy),
            self._curve: self._draw(policy, 0),
            self._with_cache: settings.cache is not None,
            **{
                field: cache.get(name, gr.skip())
                for name, field in zip(CACHE_FIELDS, self._cache, strict=True)
            },
            self._attention: settings.attention,
            **dict(zip(self._sparse, settings.svg2.model_dump().values(), strict=True)),
            self._precision: settings.precision,
            **(self.open_custom() if settings.acceleration == CUSTOM else {}),
        }

    def open_custom(self) -> dict[Any, Any]:
        """Return the updates that open the controls of custom acceleration."""
        return {
            self._custom: gr.update(open=True),
            self.attention_note: next(self.describe_attention()),
        }

    def show_busy(self, busy: bool) -> dict[Any, Any]:
        """Return the updates that let a run be stopped while one runs, and begun otherwise."""
        return {
            self.generate: gr.update(value="Generate", interactive=not busy),
            self.stop: gr.update(value="Stop", interactive=busy),
        }

    def _read_policy(self, path: str) -> tuple[Any, ...]:
        try:
            policy = CachePolicy.load(path)
        except PolicyError as error:
            # The message names the file by its place in the upload folder, which says nothing.
            text = str(error).replace(f"policy {path}: ", "")
            return None, gr.update(visible=False), html.problem(text), gr.skip()
        return policy, self._slider(policy), self._draw(policy, _balanced(policy)), CUSTOM

    @staticmethod
    def _slider(policy: CachePolicy | None) -> Any:
        if policy is None:
            return gr.update(visible=False)
        known = policy.budgets()
        high = max(known[-1], known[0] + 1)  # a slider needs two ends
        return gr.update(
            minimum=known[0], maximum=high, value=_balanced(policy), visible=len(known) > 1
        )

    @staticmethod
    def _draw(policy: CachePolicy | None, budget: Any) -> str:
        return "" if policy is None else html.curve(policy, _nearest(policy, budget))


def _size_text(settings: Settings) -> str:
    return f"{settings.width}x{settings.height}" if settings.width else ""


def _balanced(policy: CachePolicy) -> int:
    return len(policy.preset("balanced").steps)


def _nearest(policy: CachePolicy, budget: Any) -> int:
    """Return the smallest budget of the policy that is no less than asked for."""
    known = policy.budgets()
    wanted = budget if isinstance(budget, int | float) else known[0]
    return next((b for b in known if b >= wanted), known[-1])
