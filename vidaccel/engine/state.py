"""One generation of one transformer: what its steps leave behind, and what becomes of each call."""

from dataclasses import dataclass, field
from typing import Any

import torch

from vidaccel.dbcache import FIRST, PLANNED, DBCache, Decider
from vidaccel.engine.parallel import relative_change
from vidaccel.engine.residuals import Residuals
from vidaccel.engine.step_tracker import Tick
from vidaccel.plans.plan import Plan, RunSettings
from vidaccel.resolve import Course


@dataclass
class RunningCall:
    """One call of the transformer while it runs.

    Attributes:
        tick, device, started: its place, and when and where it began.
        playing: a recorded output is given back, and nothing runs.
        reused: the middle blocks do not run.
        undecided: the difference of the probe blocks will say which of the two.
        reason: why it is computed.
        position: blocks reached so far.
        blocks_run: of them, those that ran.
        probed: the main stream at the first block, then the residual of the probe blocks.
        difference: relative change of that residual, a scalar tensor.
        entry: the streams at the first middle block.
        fresh: the residual of this step, one tensor per head or stream.
        filled: of these, how many a reused step has put in.
    """

    tick: Tick
    device: torch.device
    started: Any
    playing: bool = False
    reused: bool = False
    undecided: bool = False
    reason: str = ""
    position: int = 0
    blocks_run: int = 0
    probed: Any = None
    difference: torch.Tensor | None = None
    entry: dict[str, torch.Tensor] = field(default_factory=dict)
    fresh: list[torch.Tensor] = field(default_factory=list)
    filled: int = 0

    def compute(self, reason: str) -> None:
        """Have every block run."""
        self.reused, self.reason = False, reason


class Generation:
    """A plan, a block cache or both at work, and the residuals that they reuse.

    Args:
        setting: the run.
        course: what decides about its steps.
        unit: blocks of the transformer that the block cache counts as one.

    Attributes:
        plan, cache, origin: of the course.
        probe_blocks, corrector_blocks: that always run; none without a block cache.
    """

    def __init__(self, run_settings: RunSettings, course: Course, unit: int = 1) -> None:
        self.run_settings = run_settings
        self.plan: Plan | None = course.plan
        self.cache: DBCache | None = course.cache
        self.origin = course.origin
        self.probe_blocks = 0 if self.cache is None else self.cache.probe_blocks * unit
        self.corrector_blocks = 0 if self.cache is None else self.cache.corrector_blocks * unit
        self._sigmas = run_settings.sigmas or ()
        self._residuals = Residuals("device" if self.cache is None else self.cache.store)
        self._probes: dict[str, torch.Tensor] = {}  # of the last computed step, by branch
        self._deciders: dict[str, Decider] = {}

    @property
    def bytes_held(self) -> int:
        """Bytes of the cached tensors that are kept at this moment."""
        return self._residuals.bytes_held + sum(probe.nbytes for probe in self._probes.values())

    def propose(self, call: RunningCall) -> None:
        """What is known of a call before its first block: reused, computed, or undecided."""
        step, branch = call.tick.step, call.tick.branch
        decider = self._decider(branch)
        decided = None if decider is None else decider.decided(step)
        if self.plans(step):
            call.compute(PLANNED)
        elif decider is not None and decided is False:
            call.compute(decider.reason)
        elif not self._fits(branch, step):
            call.compute(FIRST)
        elif decider is None or decided:
            call.reused = True
        elif (obstacle := decider.obstacle(step)) is not None:
            call.compute(obstacle)
        else:
            call.undecided = True
            return
        if decider is not None and decided is None:
            decider.settle(step, call.reason)

    def decide(self, call: RunningCall) -> None:
        """Hold the difference of an undecided call against the threshold: reads one number."""
        decider = self._decider(call.tick.branch)
        assert decider is not None
        difference = float("nan") if call.difference is None else float(call.difference)
        call.undecided, call.reused = False, True
        if (objection := decider.objection(difference)) is not None:
            call.compute(objection)
        decider.settle(call.tick.step, call.reason, difference)

    def compare(self, call: RunningCall, residual: torch.Tensor, group: Any = None) -> None:
        """Take the residual of the probe blocks, and how much it has changed in all of `group`."""
        call.probed = residual
        last = self._probes.get(call.tick.branch)
        if last is not None and last.shape == residual.shape:
            call.difference = relative_change(last, residual, group)

    def forecast(self, call: RunningCall, index: int, device: torch.device) -> torch.Tensor:
        """The residual of head or stream `index` for a reused call."""
        step, scale = call.tick.step, 1.0
        if self.plan is not None:
            order, scale = self.plan.order(step), self.plan.scale(step)
        else:
            order = 0 if self.cache is None else self.cache.forecast_order
        sigma, branch = self._sigmas[step], call.tick.branch
        return self._residuals.forecast(branch, index, sigma, order, device, scale)

    def finish(self, call: RunningCall) -> None:
        """Keep what later steps may ask for, and nothing else."""
        step, branch = call.tick.step, call.tick.branch
        if call.fresh:
            self._residuals.add(branch, step, self._sigmas[step], call.fresh)
        self._residuals.trim(branch, self.keeps(step))
        if self.probe_blocks and not call.reused:
            self._probes[branch] = call.probed
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

    def plans(self, step: int) -> bool:
        """Whether a plan has the step computed."""
        return self.plan is not None and self.plan.computes(step)

    def keeps(self, step: int) -> int:
        """How many of the last residuals, that of `step` included, later steps may ask for."""
        if self.plan is not None:
            return self.plan.keeps(step)
        if self.cache is None or self._is_last(step):
            return 0
        return self.cache.forecast_order + 1

    def _is_last(self, step: int) -> bool:
        return step == self.run_settings.num_inference_steps - 1

    def _decider(self, branch: str) -> Decider | None:
        if self.cache is None or not self.probe_blocks:
            return None
        key = "" if self.cache.branches == "together" else branch
        if key not in self._deciders:
            self._deciders[key] = Decider(self.cache, guards=self.plan is not None)
        return self._deciders[key]

    def _fits(self, branch: str, step: int) -> bool:
        """Whether the branch has a residual that a reused step may use."""
        last = self._residuals.last_step(branch)
        if last is None:
            return False
        # A branch that sat out the last computed step has nothing that belongs here.
        decider = self._decider(branch)
        anchor = -1 if self.plan is None else self.plan.anchor(step)
        return last >= max(anchor, -1 if decider is None else decider.computed_at)
