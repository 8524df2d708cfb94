"""Notices when components of an accelerated modular pipeline are loaded, replaced or unloaded.

`load_components`, `update_components` and `unload_components` of a modular pipeline all go through
its `register_components`, for which an instance attribute stands in.
"""

import weakref
from collections.abc import Callable
from typing import Any

from vidaccel.errors import VidaccelError

_METHOD = "register_components"

# The pipeline, and the components that were others before, by name.
Changed = Callable[[Any, dict[str, Any]], None]


def watch_components(pipe: Any, changed: Changed) -> None:
    """Call `changed` whenever components of `pipe` are others than before.

    What it raises puts the components back. Other kinds of pipelines are left alone.
    """
    if hasattr(type(pipe), _METHOD):
        vars(pipe)[_METHOD] = ComponentWatch(pipe, changed)


def unwatch_components(pipe: Any) -> None:
    """Undo `watch_components`."""
    if isinstance(vars(pipe).get(_METHOD), ComponentWatch):
        del vars(pipe)[_METHOD]


class ComponentWatch:
    """Stands in for `register_components` of one modular pipeline.

    Args:
        pipe: the pipeline.
        changed: is called when components have changed.
    """

    def __init__(self, pipe: Any, changed: Changed) -> None:
        # Weak: a cycle would keep the weights of a dropped pipeline until the collector finds it.
        self._pipe, self._class, self._changed = weakref.ref(pipe), type(pipe), changed

    def __call__(self, **components: Any) -> None:
        pipe = self._pipe()
        assert pipe is not None  # it holds this
        before = {
            name: known
            for name, part in components.items()
            if (known := getattr(pipe, name, None)) is not part
        }
        self._class.register_components(pipe, **components)
        try:
            if before:
                self._changed(pipe, before)
        except VidaccelError:
            self._class.register_components(pipe, **before)
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return what stands in the copy of the pipeline: the method of its own class."""
        return self._class.register_components.__get__(memo.get(id(self._pipe())))
