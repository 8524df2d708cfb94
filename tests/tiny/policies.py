"""Small policy files as JSON objects, and the run that they are for."""

import json

from vidaccel.hosts import HOSTS
from vidaccel.plans.plan import RunSettings
from vidaccel.plans.policy import CachePolicy
from vidaccel.resolve import Resolver

SIGMAS = [1.0, 0.9, 0.8, 0.6, 0.4, 0.1]


def valid():
    """A measured policy of 6 steps as the JSON object of its file."""
    edges = {(0, 2): 0.1, (2, 4): 0.25, (4, 5): 0.0, (0, 3): 0.3, (3, 5): 0.5}
    return {
        "schema_version": "1.0",
        "model": {
            "transformer": "WanTransformer3DModel",
            "id": "org/tiny-wan",
            "config_hash": None,
        },
        "num_inference_steps": 6,
        "scheduler": {
            "name": "FlowMatchEulerDiscreteScheduler",
            "shift": 3.0,
            "sigmas": list(SIGMAS),
        },
        "guidance": {"mode": "sequential", "scale": 5.0},
        "width": 96,
        "height": 96,
        "frames": 17,
        "quantity": "stack_residual",
        "max_skip": 3,
        "edges": [
            {"start": i, "end": j, "mean": mean, "spread": 0.01, "count": 8}
            for (i, j), mean in edges.items()
        ],
        "noise_floor": 0.0,
        "objective": "leximax",
        "plans": {
            "4": {"steps": [0, 2, 4, 5], "errors": [0.1, 0.25, 0.0]},
            "3": {"steps": [0, 3, 5], "errors": [0.3, 0.5]},
        },
        "prompts": ["a red circle"],
        "prompts_hash": "0" * 64,
        "seeds": [0],
        "attention": "dense",
        "validation": [
            {
                "budget": 4,
                "candidate": "leximax",
                "kept": True,
                "psnr": 30.5,
                "worst_psnr": 28.0,
                "speedup": 1.4,
            }
        ],
        "provenance": "measured",
        "source": None,
        "versions": {"torch": "2.10"},
    }


def parse(data):
    """The policy of a JSON object."""
    return CachePolicy.from_json(json.dumps(data))


def forecasting():
    """The valid policy with one line that its plan of 4 uses."""
    data = valid()
    line = {"start": 2, "end": 4, "order": 1, "scale": 0.5, "previous": 0, "mean": 0.1, "count": 8}
    data["edges"].append(line)
    data["plans"]["4"] |= {"errors": [0.1, 0.1, 0.0], "orders": [0, 1, 0], "scales": [1, 0.5, 1]}
    data["plans"]["4"]["stability"] = [1.0, 0.5, 0.75, 1.0]
    return data


def run_settings(**changes):
    """The run that the valid policy is for, with changes."""
    known = {
        "transformer": "WanTransformer3DModel",
        "num_inference_steps": 6,
        "model_id": "org/tiny-wan",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "sigmas": tuple(SIGMAS),
    }
    return RunSettings(**(known | changes))


def plan_of(policy, run, preset="balanced"):
    """The plan that `accelerate(policy=..., cache=None)` comes to in a run."""
    return Resolver(policy, None, preset).decide(run, HOSTS["WanTransformer3DModel"]).plan
