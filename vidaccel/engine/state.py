"""The state of one generation of one transformer, and of each call while it runs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from vidaccel.dbcache import CHANGED, FIRST, PLANNED, DBCache, Decider
from vidaccel.engine.parallel import relative_change
from vidaccel.engine.residuals import Residuals
from vidaccel.engine.stats import Call
from vidaccel.hosts.spec import HostSpec
from vidaccel.plans.plan import Plan, RunSettings


@dataclass(frozen=True)
class Decision:
    """The plan, the block cache or both that decide about the steps of one generation.

    Attributes:
        plan: the computed steps; None lets the cache decide alone.
        cache: the block cache, with a threshold; None leaves the plan alone.
        origin: where that comes from, for reports.
        learn: the cost of reuse is to be learned from this generation, which computes every step.
    """

    plan: Plan | None
    cache: DBCache | None
    origin: str = ""
    learn: bool = False


class DecisionSource(Protocol):
    """Decides about the steps of a generation once its run is known."""

    @property
    def description(self) -> str:
        """The name in reports."""

    def check(self, transformer: nn.Module, host: HostSpec) -> None:
        """Refuse what cannot work with the blocks of this transformer."""

    def decide(self, run: RunSettings, host: HostSpec) -> Decision:
        """Return the decision for a run of the model of this row."""


@dataclass(frozen=True)
class CallContext:
    """The place of one call of the transformer in its generation.

    Attributes:
        step: index of the denoising step in the scheduler's table.
        num_inference_steps: length of that table.
        branch: the guidance branch ("cond", "uncond", ...).
        restarted: a generation begins: nothing kept from earlier calls belongs to it.
        reshaped: the latents of the running generation have another shape from here on, which
            nothing kept from earlier calls fits.
        changed: the branch is given another prompt, other inputs or adapters than when it was
            called last.
    """

    step: int
    num_inference_steps: int
    branch: str
    restarted: bool
    reshaped: bool = False
    changed: bool = False


@dataclass
class RunningCall:
    """One call of the transformer while it runs.

    Attributes:
        context: its place in the generation.
        blocks: blocks that it reaches.
        device, started: where and when it began.
        replayed: a recorded output is given back, and nothing runs.
        reason: why every block runs; "" when the middle ones do not; None while the difference of
            the probe blocks has to tell.
        position: blocks reached so far.
        blocks_run: blocks reached that ran.
        probe_input: the main stream at the first block [B, S, C].
        probe_residual: what the probe blocks have added to it [B, S / probe_stride, C].
        difference: relative change of `probe_residual`, a scalar tensor.
        entry: the streams at the first middle block.
        residuals: what a computed step adds, one tensor per head or stream.
        has_main: whether each of them is of the main stream.
        residuals_applied: how many of those that are kept a reused step has put in.
        trajectory, generation: those that it belongs to.
        attention: is told of its blocks.
        arguments: what the transformer was given.
        put: main stream at the first block -> what goes into its head; of a call that runs only
            embedding and head, around whatever that is.
    """

    context: CallContext
    blocks: int
    device: torch.device
    started: Any
    replayed: bool = False
    reason: str | None = ""
    position: int = 0
    blocks_run: int = 0
    probe_input: torch.Tensor | None = None
    probe_residual: torch.Tensor | None = None
    difference: torch.Tensor | None = None
    entry: dict[str, torch.Tensor] = field(default_factory=dict)
    residuals: list[torch.Tensor] = field(default_factory=list)
    has_main: list[bool] = field(default_factory=list)
    residuals_applied: int = 0
    trajectory: Any = None
    generation: "Generation | None" = None
    attention: Any = None
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    put: Callable[[torch.Tensor], torch.Tensor] | None = None

    def told(self, ended: Any) -> Call:
        """Return what statistics keep of the call, which has ended at a moment."""
        generation, step = self.generation, self.context.step
        planned = generation is None or generation.plan is None or generation.is_planned(step)
        return Call(
            step=step,
            branch=self.context.branch,
            reused=self.reused,
            planned=planned,
            blocks=self.blocks_run,
            total=self.blocks,
            started=self.started,
            ended=ended,
            reason=self.reason or "",
            difference=self.difference,
        )

    @property
    def undecided(self) -> bool:
        """The difference of the probe blocks has to tell whether the middle runs."""
        return self.reason is None

    @property
    def reused(self) -> bool:
        """The middle blocks do not run."""
        return self.reason == "" and not self.replayed


class Generation:
    """A plan, a block cache or both at work, and the residuals that they reuse.

    Args:
        run: the run that this is a generation of.
        decision: what decides about its steps.
        unit: blocks of the transformer that the block cache counts as one.

    Attributes:
        plan, cache, origin, learn: those of the decision.
        probe_blocks, corrector_blocks: blocks that always run; none without a block cache.
    """

    def __init__(self, run: RunSettings, decision: Decision, unit: int = 1) -> None:
        self.run = run
        self.plan, self.cache, self.origin = decision.plan, decision.cache, decision.origin
        self.learn = decision.learn
        self.probe_blocks = 0 if self.cache is None else self.cache.probe_blocks * unit
        self.corrector_blocks = 0 if self.cache is None else self.cache.corrector_blocks * unit
        self._sigmas = run.sigmas or ()
        self._residuals = Residuals("device" if self.cache is None else self.cache.store)
        self._probes: dict[str, torch.Tensor] = {}  # of the last computed step, by branch
        self._deciders: dict[str, Decider] = {}

    @property
    def bytes_held(self) -> int:
        """Bytes of the cached tensors that are kept at this moment."""
        return self._residuals.bytes_held + sum(probe.nbytes for probe in self._probes.values())

    def begin_step(self, step: int) -> None:
        """Free what belongs to branches that sat out the last computed step."""
        for branch in self._residuals.branches():
            if not self._has_residual_for(branch, step - 1):
                self._residuals.trim(branch, 0)
                self._probes.pop(branch, None)

    def decide(self, call: RunningCall, doubt: str = "") -> None:
        """Decide a call before its first block, as far as it can be decided then.

        Args:
            call: the call.
            doubt: why nothing of this generation is reused; empty when there is no reason.
        """
        step, branch = call.context.step, call.context.branch
        decider = self._decider(branch)
        decided = decider is not None and decider.has_decided(step)
        if self.is_planned(step):
            call.reason = PLANNED
        elif doubt or call.context.changed:
            call.reason = doubt or CHANGED
        elif decider is not None and decided and decider.reason:
            call.reason = decider.reason
        elif not self._has_residual_for(branch, step):
            call.reason = FIRST
        elif decider is None or decided:
            call.reason = ""
        else:
            call.reason = decider.before_probe(step)
        if decider is not None and not decided and call.reason is not None:
            decider.record(step, call.reason)

    def decide_by_probe(self, call: RunningCall) -> None:
        """Hold the difference of an undecided call against the threshold: reads one number."""
        decider = self._decider(call.context.branch)
        assert decider is not None
        difference = float("nan") if call.difference is None else float(call.difference)
        call.reason = decider.after_probe(difference)
        decider.record(call.context.step, call.reason, difference)

    def take_probe(self, call: RunningCall, residual: torch.Tensor, group: Any = None) -> None:
        """Take the residual of the probe blocks, and how much it has changed in all of `group`."""
        call.probe_residual = residual
        last = self._probes.get(call.context.branch)
        if last is not None and last.shape == residual.shape:
            call.difference = relative_change(last, residual, group)

    def forecast(self, call: RunningCall, index: int, device: torch.device) -> torch.Tensor:
        """Return the residual of head or stream `index` for a reused call."""
        step, scale = call.context.step, 1.0
        if self.plan is not None:
            order, scale = self.plan.order(step), self.plan.scale(step)
        else:
            order = 0 if self.cache is None else self.cache.forecast_order
        sigma, branch = self._sigmas[step], call.context.branch
        return self._residuals.forecast(branch, index, sigma, order, device, scale)

    def end(self, call: RunningCall) -> None:
        """Keep what later steps may ask for, and nothing else."""
        step, branch = call.context.step, call.context.branch
        if call.context.changed:
            self._residuals.trim(branch, 0)  # of other conditions
        if call.residuals:
            self._residuals.add(branch, step, self._sigmas[step], call.residuals)
        self._residuals.trim(branch, self.keeps(step))
        if call.probe_residual is not None and not call.reused:
            self._probes[branch] = call.probe_residual
        if self._is_last(step):
            self._probes.pop(branch, None)

    def forget(self) -> None:
        """Free everything that is kept."""
        self.forget_tensors()
        self._deciders.clear()

    def forget_tensors(self) -> None:
        """Free what is kept and no longer fits, because the latents have another shape now."""
        self._residuals.clear()
        self._probes.clear()

    def is_planned(self, step: int) -> bool:
        """Tell whether a plan has the step computed."""
        return self.plan is not None and self.plan.computes(step)

    def keeps(self, step: int) -> int:
        """Return how many of the last residuals, that of `step` included, later steps may want."""
        if self.plan is not None:
            return self.plan.keeps(step)
        if self.cache is None or self._is_last(step):
            return 0
        return self.cache.forecast_order + 1

    def _is_last(self, step: int) -> bool:
        return step == self.run.num_inference_steps - 1

    def _decider(self, branch: str) -> Decider | None:
        if self.cache is None or not self.probe_blocks:
            return None
        key = "" if self.cache.branches == "together" else branch
        if key not in self._deciders:
            self._deciders[key] = Decider(self.cache, guards=self.plan is not None)
        return self._deciders[key]

    def _has_residual_for(self, branch: str, step: int) -> bool:
        """Tell whether the branch has a residual that a reused step may use."""
        last = self._residuals.last_step(branch)
        if last is None:
            return False
        # A branch that sat out the last computed step has nothing that belongs here.
        decider = self._decider(branch)
        anchor = -1 if self.plan is None else self.plan.anchor(step)
        return last >= max(anchor, -1 if decider is None else decider.computed_at)
