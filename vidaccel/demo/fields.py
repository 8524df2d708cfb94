"""The fields of numbers on the page."""

import gradio as gr

from vidaccel.dbcache import DEFAULT_THRESHOLD
from vidaccel.demo.settings import BlockCache
from vidaccel.svg2.settings import SVG2

# Name in the settings -> label and explanation.
CACHE_FIELDS = {
    "threshold": ("Threshold", "lower it if quality drops; empty for that of the model"),
    "probe_blocks": ("Probe blocks", "blocks that always run first"),
    "corrector_blocks": ("Corrector blocks", "blocks that always run last"),
    "warmup_steps": ("Warm-up steps", "computed in any case"),
    "max_consecutive": ("Reused in a row", "at most; empty for no limit"),
    "forecast_order": ("Forecast order", "0 holds the residual, 1 and 2 extend it"),
}

CACHE_DEFAULTS = BlockCache(threshold=DEFAULT_THRESHOLD).model_dump()

SPARSE_FIELDS = {
    "top_p": ("top_p", "share of the attention mass that is kept"),
    "dense_steps": ("Dense first steps", "empty for a fifth of all"),
    "min_tokens": ("Shortest sequence", f"tokens; empty for {SVG2.min_tokens}"),
}


def number_field(
    label: str,
    value: float | None,
    info: str,
    *,
    whole: bool = True,
    name: str = "",
    min_width: int = 120,
) -> gr.Number:
    """Make a field for a number; its element id is its name, or its label where it has none."""
    return gr.Number(
        value,
        label=label,
        info=info,
        precision=0 if whole else None,
        min_width=min_width,
        elem_id=(name or label.lower()).replace("_", "-").replace(" ", "-"),
    )
