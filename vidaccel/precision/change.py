"""The change of a pipeline from one precision to another, checked whole before it is made."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from vidaccel.engine.report import PrecisionReport
from vidaccel.errors import PrecisionError
from vidaccel.hosts.spec import HostSpec
from vidaccel.precision.attachment import PrecisionAttachment, attachment_of
from vidaccel.precision.settings import Precision, settings_of


class PrecisionChange:
    """The change that `accelerate(precision=...)` makes to the transformers of a pipeline.

    What has the same settings already stays as it is.

    Args:
        pipe: the pipeline.
        found: its transformers with their rows, by component.
        precision: what it is to be in; None for the precision it was loaded in.

    Raises:
        PrecisionError: it cannot be; nothing has been changed then.
    """

    def __init__(
        self, pipe: Any, found: Mapping[str, tuple[nn.Module, HostSpec]], precision: Precision
    ) -> None:
        settings = settings_of(precision)
        self._old: list[PrecisionAttachment] = []
        self._new: list[PrecisionAttachment] = []
        for component, (transformer, host) in found.items():
            present = attachment_of(transformer)
            if (None if present is None else present.settings) == settings:
                continue
            _check_not_running(pipe)
            if present is not None:
                present.check_return()
                self._old.append(present)
            if settings is not None:
                self._new.append(PrecisionAttachment(transformer, host, settings, component))

    def make(self) -> None:
        """Make it.

        Raises:
            PrecisionError: a weight is not finite, or cannot be kept on the disk; every transformer
                is in the precision that it was loaded in then.
        """
        for present in self._old:
            present.detach()
        made: list[PrecisionAttachment] = []
        try:
            for attachment in self._new:
                attachment.attach()
                made.append(attachment)
        except BaseException:
            for attachment in made:
                attachment.detach()
            raise
        for attachment in made:
            attachment.settle()


def refuse_low_precision(pipe: Any, transformers: Iterable[nn.Module]) -> None:
    """Refuse a pipeline in low precision where runs of it are measured with `restore` in between.

    Raises:
        PrecisionError: a transformer is.
    """
    if any(attachment_of(transformer) is not None for transformer in transformers):
        raise PrecisionError(
            f"this {type(pipe).__name__} is in low precision, and measuring it would give its "
            "weights back on the way: call vidaccel.restore(pipe) first; what is measured then "
            "runs in low precision too, and the report says so"
        )


def precision_report(transformer: nn.Module) -> PrecisionReport | None:
    """Tell what of a transformer is in low precision; None when nothing is."""
    attachment = attachment_of(transformer)
    return None if attachment is None else attachment.report()


def _check_not_running(pipe: Any) -> None:
    """Refuse to change weights under a generation that runs in this thread.

    Raises:
        PrecisionError: `pipe` is being called.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe:
            raise PrecisionError(
                "the pipeline is running: change its precision before or after a generation"
            )
        frame = frame.f_back
