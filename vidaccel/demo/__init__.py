"""The demo page. `create_demo` builds it, `serve` runs it."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Import the page, and Gradio with it, only when it is asked for."""
    if name not in ("create_demo", "serve"):
        raise AttributeError(f"module 'vidaccel.demo' has no attribute {name!r}")
    from vidaccel.demo import page, server

    return page.create_demo if name == "create_demo" else server.serve
