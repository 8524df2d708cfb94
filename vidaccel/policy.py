"""The policy file, under the name by which programs import it; see `vidaccel.plans.policy`."""

from vidaccel.plans.policy import CachePolicy

__all__ = ["CachePolicy"]
