"""Turns the arguments of `accelerate` into one `Decision` per run, and an attention."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from vidaccel.automatic import (
    FEW,
    LEARNING,
    generic,
    known_plan,
    measured_plan,
    with_doubt,
)
from vidaccel.dbcache import DBCache
from vidaccel.engine.attention_hook import AttentionHook
from vidaccel.engine.state import Decision
from vidaccel.errors import AttentionError, PlanError, PolicyError, UnsupportedPipelineError
from vidaccel.hosts.spec import HostSpec
from vidaccel.plans.plan import FEW_STEPS, Plan, RunSettings
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.store import shipped_as
from vidaccel.plans.wish import Wish
from vidaccel.svg2.settings import SVG2
from vidaccel.svg2.support import gpu_here, gpu_of, why_dense, why_not_on

_EVERY = re.compile(r"\s*every[ :]?(\d{1,6})\s*")
_STEPS = re.compile(r"-?\d{1,9}(\s*,\s*-?\d{1,9})*")  # Python refuses to read endless digits

# The arguments of `accelerate`. A policy is "auto", "every N", None (every step), computed steps, a
# plan, a policy, or the file, folder or hub id of one.
Policy = str | os.PathLike[str] | Sequence[int] | Plan | CachePolicy | None
Cache = Literal["auto"] | DBCache | None
Attention = Literal["auto"] | SVG2 | None
Preset = Literal["quality", "balanced", "fast"]

# Runs this short are those with which servers warm up; they pass whatever was asked for.
WARM_UP_STEPS = 2

# The run -> its plan; None where nothing is known of such a run.
_Planner = Callable[[RunSettings], Plan | None]


class Resolver:
    """The arguments of `accelerate`, read and checked once, which decide as soon as a run is known.

    `accelerate` takes one in the place of a policy, so that a program that has made one already
    reads no file twice.

    Args:
        policy: "auto" (what `vidaccel.automatic` finds), "learn" (a policy that was measured or
            learned for such runs, or a run from which one is learned), None (every step),
            "every N", a sequence of computed steps, a `Plan`, a `CachePolicy`, or a file, folder or
            hub id that holds one.
        cache: None; a `DBCache`, which guards the plan of a policy and decides alone where there
            is none (policy=None, or "auto" on a model of which nothing is known). "auto" is None
            by another name.
        preset: "quality", "balanced" or "fast": a speedup of 2, 3 or 5, as far as a policy goes.
        allow_transfer: carry a policy that was given over to another number of steps, scheduler or
            noise grid of the same model; without it such a run is refused.
        wish: the arguments of `CachePolicy.plan` that pick the plan of a policy, in the place of
            the preset; with "auto", of what it finds.
        anew: with "learn", learn from every run, whatever is known of such runs.

    Attributes:
        cache: the block cache that was asked for by name, if any.
        policy: the name of the policy alone, for reports.

    Raises:
        PlanError, PolicyError: an argument is none of these, or cannot be read.
    """

    def __init__(
        self,
        policy: Policy,
        cache: Cache = None,
        preset: Preset = "balanced",
        *,
        allow_transfer: bool = False,
        wish: Mapping[str, Any] | None = None,
        anew: bool = False,
    ) -> None:
        self._wish = Wish(preset, **(wish or {}))
        self.policy, self._plan_for = _planner(policy, self._wish, allow_transfer)
        if cache is not None and cache != "auto" and not isinstance(cache, DBCache):
            raise PlanError(f"cache is 'auto', None or a DBCache, found {type(cache).__name__}")
        self.cache = cache if isinstance(cache, DBCache) else None
        self._alone = self.cache is not None and policy is None
        self.learns = isinstance(policy, str) and policy == "learn"
        self._anew = anew and self.learns
        self._not_learnable: set[RunSettings] = set()
        automatic = self.learns or (isinstance(policy, str) and policy == "auto")
        if self.cache is not None and not self.cache.probe_blocks and (self._alone or automatic):
            raise PlanError(
                "probe_blocks=0 leaves nothing to decide by: use it with a plan or policy"
            )

    @property
    def description(self) -> str:
        """The name in reports of what was asked for."""
        named = [] if self._alone else [self.policy]
        named += [] if self.cache is None else [str(self.cache)]
        return " with ".join(named)

    def plan(self, run: RunSettings) -> Plan | None:
        """The plan of the policy for a run; None where the policy is "auto" and knows none.

        Raises:
            PlanError, PolicyError: it is for another run.
        """
        return self._plan_for(run)

    def decide(self, run: RunSettings, host: HostSpec) -> Decision:
        """Decide a run of the model of this row.

        Raises:
            PlanError, PolicyError: nothing that was asked for fits it.
        """
        if run.num_inference_steps <= WARM_UP_STEPS:
            every = replace(Plan.every(1, run.num_inference_steps), origin=FEW)
            return Decision(every, None, FEW)
        anew = self._anew and run.num_inference_steps >= FEW_STEPS
        plan = None if self._alone or anew else self.plan(run)
        if plan is None and self.learns:
            if run not in self._not_learnable:
                every = replace(Plan.every(1, run.num_inference_steps), origin=LEARNING)
                return Decision(every, None, LEARNING, learn=True)
            plan = known_plan(run, self._wish)
        if plan is None and self.cache is not None:
            return _by_cache(self.cache, run, host)
        plan = plan or generic(run, self._wish)
        guard = None if self.cache is None else self.cache.with_threshold(host.threshold)
        return Decision(plan, guard, plan.origin)

    def cannot_learn(self, run: RunSettings) -> None:
        """Have runs of a kind from which nothing could be learned go on as with "auto"."""
        self._not_learnable.add(run)

    def check(self, transformer: Any, host: HostSpec) -> None:
        """Hold the block cache that was asked for against the blocks of a transformer.

        Raises:
            PlanError: there are too few blocks for its probe and corrector blocks.
            UnsupportedPipelineError: the model cannot have corrector blocks.
        """
        if self.cache is None:
            return
        probe, corrector = self.cache.probe_blocks, self.cache.corrector_blocks
        name = type(transformer).__name__
        first, last = (len(getattr(transformer, host.blocks[i].name)) for i in (0, -1))
        total = host.block_count(transformer) // host.unit
        if probe + corrector >= total:
            raise PlanError(
                f"probe_blocks + corrector_blocks is {probe} + {corrector}, but {name} has {total} "
                f"blocks: leave at least one between them"
            )
        if probe >= first and len(host.blocks) > 1 and not host.interleaved:
            raise PlanError(
                f"probe_blocks is {probe}, but {host.blocks[0].name} of {name} has {first} blocks: "
                f"probe {first - 1} at most"
            )
        if corrector > last:
            raise PlanError(
                f"corrector_blocks is {corrector}, but {host.blocks[-1].name} of {name} has "
                f"{last} blocks: correct {last} at most"
            )
        if corrector and host.no_corrector:
            raise UnsupportedPipelineError(f"{name} {host.no_corrector}: set corrector_blocks=0")


def policy_from_text(text: str, *, files: bool = True) -> str | list[int] | None:
    """Read what a user has typed as `accelerate(policy=...)` takes it.

    Args:
        text: "auto", "learn", "all" (every step), "every N", a list such as 0,1,5, or, with
            `files`, a file, folder or hub id.
        files: take what is none of the others for the name of a policy.

    Raises:
        PlanError: it is none of these.
    """
    text = text.strip()
    if text == "all":
        return None
    if _STEPS.fullmatch(text):
        return [int(step) for step in text.split(",")]
    if files or text in ("auto", "learn") or _EVERY.fullmatch(text):
        return text
    raise PlanError(
        f"the steps are auto, learn, all, every N, or a list such as 0,1,5; found {text[:80]!r} "
        "(a policy file is uploaded)"
    )


def _planner(policy: Policy, wish: Wish, allow_transfer: bool) -> tuple[str, _Planner]:
    """Return the name of a policy in reports, and what gives its plan for a run."""
    if isinstance(policy, CachePolicy):
        return _of_policies([policy], "given", wish, allow_transfer)
    if isinstance(policy, os.PathLike) or (
        isinstance(policy, str) and ("/" in policy or policy.endswith(".json"))
    ):
        name = os.fspath(policy)
        return _of_policies(_named(policy), name, wish, allow_transfer)
    if isinstance(policy, str) and policy in ("auto", "learn"):
        find = known_plan if policy == "auto" else measured_plan
        return policy, lambda run: find(run, wish)
    if wish.given:
        raise PolicyError(
            f"{', '.join(wish.given)}: only a policy has a plan for that, found "
            f"{'every step' if policy is None else repr(policy)}; name a policy, or take auto"
        )
    if policy is None:
        return "every step", lambda run: Plan.every(1, run.num_inference_steps)
    if isinstance(policy, Plan):
        return str(policy), lambda run: _fitting(policy, run.num_inference_steps)
    if isinstance(policy, str):
        match = _EVERY.fullmatch(policy)
        if match is None:
            raise PlanError(
                f"policy is 'auto', 'learn', 'every N' or a list of steps, found {policy!r}"
            )
        n = int(match[1])
        Plan.every(n, 1)
        return f"every {n}", lambda run: Plan.every(n, run.num_inference_steps)
    if isinstance(policy, Sequence):
        steps = Plan.check_steps(policy)
        return f"{len(steps)} listed steps", lambda run: Plan(steps, run.num_inference_steps)
    raise PlanError(
        "policy is 'auto', 'learn', None, 'every N', a list of computed steps or a Plan, "
        f"found {type(policy).__name__}"
    )


def _named(policy: str | os.PathLike[str]) -> list[CachePolicy]:
    """Read the policy of that name, or all that are shipped for the model of that name."""
    shipped = {} if os.path.exists(policy) else shipped_as(os.fspath(policy))
    if len(shipped) > 1:
        return [CachePolicy.load(path) for path in shipped.values()]
    return [CachePolicy.from_pretrained(policy)]


def _of_policies(
    policies: Sequence[CachePolicy],
    name: str,
    wish: Wish,
    allow_transfer: bool,
) -> tuple[str, _Planner]:
    """Plan a run by the one of the policies that is nearest to it in its number of steps."""
    # What the only policy has no plan for is refused before any run.
    told = f"policy {name}" + (f": {wish.of(policies[0])}" if len(policies) == 1 else "")

    def plan_for(run: RunSettings) -> Plan:
        """The plan for this run; raises PolicyError when the policy is for another."""
        steps = run.num_inference_steps
        policy = min(policies, key=lambda known: abs(known.num_inference_steps - steps))
        if len(policies) > 1 and policy.num_inference_steps != steps and not allow_transfer:
            there = " and ".join(str(known.num_inference_steps) for known in policies)
            raise PolicyError(f"{name} has policies for {there} steps, this run has {steps}")
        try:
            policy.check(run)
        except PolicyError:
            if not allow_transfer:
                raise
            from vidaccel.lemica.transfer import transferred

            moved = wish.of(transferred(policy, run))
            total = policy.num_inference_steps
            origin = f"{moved}, transferred from {total} steps, not validated"
            return replace(moved, origin=with_doubt(origin, policy, run))
        return replace(wish.of(policy), origin=with_doubt("", policy, run))

    return told, plan_for


def _fitting(plan: Plan, total: int) -> Plan:
    if plan.num_inference_steps != total:
        raise PlanError(
            f"the plan is made for {plan.num_inference_steps} steps, but this run has {total}: "
            f"pass num_inference_steps={plan.num_inference_steps} or another plan"
        )
    return plan


def _by_cache(cache: DBCache, run: RunSettings, host: HostSpec) -> Decision:
    """A block cache that decides alone."""
    cache, steps = cache.with_threshold(host.threshold), run.num_inference_steps
    if cache.warmup_interval == 1 and cache.warmup_steps >= steps:
        few = f"every step, since the warm-up takes {cache.warmup_steps} and the run has {steps}"
        return Decision(replace(Plan.every(1, steps), origin=few), None, few)
    return Decision(None, cache, str(cache))


def attention_of(attention: Attention, transformer: nn.Module, host: HostSpec) -> AttentionHook:
    """Make what `accelerate(attention=...)` asks for, for one transformer.

    Args:
        attention: None leaves attention alone; an `SVG2` makes it sparse; "auto" does so with
            `SVG2()` where there is a GPU that runs the kernels, the model allows it, and a sparse
            call is faster than a dense one, and tells in the report where not.

    Judged is the device on which the transformer is, or to which its offloading moves it. One that
    is moved to a GPU later is judged there, by its first call.

    Raises:
        AttentionError: it is none of these, or this attention cannot be made sparse, by an `SVG2`
            on the GPU of this transformer. On all other devices an `SVG2` runs in torch.
    """
    if attention is None:
        return AttentionHook()
    if attention != "auto" and not isinstance(attention, SVG2):
        raise AttentionError(
            f"attention is 'auto', None or an SVG2, found {type(attention).__name__}"
        )
    gpu = gpu_of(transformer)
    if attention == "auto" and gpu is None and gpu_here() is None:
        return AttentionHook()
    # Only here, since Triton and Diffusers' attention take seconds to import.
    from vidaccel.svg2.gate import Gate, why_trial_fails
    from vidaccel.svg2.runner import SparseAttention

    if isinstance(attention, SVG2):
        sparse = SparseAttention(transformer, host, attention)
        # On all other devices torch runs in the place of the kernels.
        if gpu is None or gpu.type != "cuda":
            return sparse
        reason = why_not_on(gpu, transformer, host)
        if reason := reason or why_trial_fails(gpu, transformer, host, attention):
            raise AttentionError(
                f"the attention of {type(transformer).__name__} cannot be made sparse on {gpu}: "
                f"{reason}; pass attention=None"
            )
        return sparse
    reason = why_dense(transformer, host)
    if reason := reason or ("" if gpu is None else why_not_on(gpu, transformer, host)):
        return AttentionHook(f"dense, since {reason}")
    return SparseAttention(transformer, host, SVG2(), gpu_only=True, gate=Gate())
