"""The errors that vidaccel raises on purpose, each with one message for the user."""

from __future__ import annotations


class VidaccelError(Exception):
    """Base of all: the message says what was wrong and what to do, and the command line exits 2."""


class UnsupportedPipelineError(VidaccelError):
    """The pipeline, its transformer or its setup is one that vidaccel cannot accelerate."""


class PlanError(VidaccelError):
    """A plan or a policy is malformed, or does not fit the generation it is used for."""


class PolicyError(PlanError):
    """A policy file is malformed, or is not made for the pipeline and run it is used for."""


class AttentionError(VidaccelError):
    """Settings of sparse attention that cannot be, or an attention that cannot be made sparse."""


class PrecisionError(VidaccelError):
    """Settings of low precision that cannot be, or a model that cannot run in it or come back."""


class BuildError(VidaccelError):
    """A work folder belongs to another build, or cannot be read or written."""


class ScheduleError(VidaccelError):
    """The transformer is not driven by the scheduler that the pipeline had when accelerated."""


class ModelError(VidaccelError):
    """A model cannot be found or loaded, or does not take what it was asked for."""


class OutputError(VidaccelError):
    """A result cannot be written where it was asked for."""


class SettingsError(VidaccelError):
    """The settings of a run are malformed, or beyond the limits of the page."""


class QueueFullError(VidaccelError):
    """Too many runs are waiting already."""


class VideoError(VidaccelError):
    """A clip has the wrong form, or a video or picture cannot be read or written."""


class UnavailableError(VidaccelError):
    """A part of vidaccel needs a package that is not installed."""


class MetricUnavailable(VidaccelError):
    """A metric needs a package or weights that are not there."""


class BenchError(VidaccelError):
    """A benchmark cannot go on, or its work folder belongs to another one."""
