"""The table of supported models against the models, and rows of one's own."""

import ast
from collections import defaultdict
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from packaging.version import Version

from tiny import CASES, SINCE, WITHOUT_CASE, Case
from tiny.others import easyanimate
from tiny.wan import wan
from vidaccel import BlockList, Head, HostSpec, accelerate, register_host
from vidaccel.errors import UnsupportedPipelineError
from vidaccel.hosts.left_out import ROWS as LEFT_OUT
from vidaccel.hosts.left_out import UNTESTED
from vidaccel.hosts.registry import HOSTS, find_transformers, left_out_list, markdown_table

ROOT = Path(__file__).resolve().parents[2]

# The release of Diffusers that the reasons are about; older ones lack some of its classes.
NEWEST = Version("0.42")


def built() -> dict[str, Case]:
    installed = Version(diffusers.__version__)
    names = [name for name in CASES if Version(SINCE.get(name, "0")) <= installed]
    return {name: CASES[name]() for name in names}


def test_every_row_is_tested_in_the_pipelines_it_names_and_says_what_is_there():
    tested, since = defaultdict(set), defaultdict(list)
    for name, case in built().items():
        for model, row in find_transformers(case.pipe).values():
            tested[row.transformer].add(type(case.pipe).__name__)
            assert row.transformer == type(model).__name__
            since[row.transformer].append(Version(SINCE.get(name, "0.38")))
            for blocks in row.blocks:
                if row.attention is not None:
                    assert blocks.name in model._modules
                    model._modules[blocks.name][0].get_submodule(row.attention)
    installed = Version(diffusers.__version__)
    rows = {
        name: {pipeline for pipeline in row.pipelines if hasattr(diffusers, pipeline)}
        for name, row in HOSTS.items()
        if not row.unsupported and Version(row.since) <= installed
    }
    assert dict(tested) == rows
    assert {name: min(versions) for name, versions in since.items()} == {
        name: Version(HOSTS[name].since) for name in rows
    }


def test_the_arguments_that_a_row_names_are_those_of_its_transformer():
    for name, row in HOSTS.items():
        if row.unsupported or not hasattr(diffusers, name):
            continue
        named = {row.sample, row.timestep, row.prompt, row.video_rows}
        named |= {found[0] for found in (row.aside, row.left_out) if found is not None}
        known = signature(getattr(diffusers, name).forward).parameters
        assert not named - {None} - known.keys(), name


# Arguments that only pipelines for video have.
FRAMES = {
    "control_video",
    "frames",
    "num_frames",
    "pose_video",
    "video",
    "video_length",
}


def video_pipelines() -> set[str]:
    """Names of the exported pipelines whose call has an argument that only video has.

    Read from the source: a pipeline whose dependencies are missing has no signature to look at.
    """
    found = {}
    for file in (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef) or not hasattr(diffusers, node.name):
                continue
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__call__":
                    arguments = (*method.args.args, *method.args.kwonlyargs)
                    found[node.name] = {argument.arg for argument in arguments}
    return {name for name, arguments in found.items() if arguments & FRAMES}


def modular_pipelines() -> set[str]:
    """Names of the exported modular pipelines."""
    base = {"ModularPipeline"}
    return {name for name in dir(diffusers) if name.endswith("ModularPipeline")} - base


def transformer_classes() -> set[str]:
    """Names of the exported models that run a list of blocks, read from the source."""
    found = set()
    for file in (Path(diffusers.__file__).parent / "models" / "transformers").glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef) or not hasattr(diffusers, node.name):
                continue
            a_model = any("ModelMixin" in ast.unparse(base) for base in node.bases)
            if a_model and "nn.ModuleList(" in ast.unparse(node):
                found.add(node.name)
    return found


def test_every_transformer_class_of_diffusers_has_a_row_or_a_reason_why_not():
    found = transformer_classes()
    assert sorted(found - HOSTS.keys()) == []
    # A class that no release has any more needs no reason, and one with a row neither.
    if Version(diffusers.__version__) >= NEWEST:
        assert sorted({row.transformer for row in LEFT_OUT} - found) == []


def test_every_modular_pipeline_of_diffusers_has_a_case_or_a_reason_why_not():
    tested = {type(case.pipe).__name__ for case in built().values()}
    assert not tested & UNTESTED.keys()
    assert sorted(modular_pipelines() - tested - UNTESTED.keys()) == []
    if Version(diffusers.__version__) >= NEWEST:
        assert sorted(UNTESTED.keys() - modular_pipelines()) == []


def test_every_video_pipeline_of_diffusers_has_a_case_or_a_reason_why_not():
    tested = {type(case.pipe).__name__ for case in built().values()}
    excused = {name for row in HOSTS.values() for name, _ in row.untested}
    excused |= {name for row in HOSTS.values() if row.unsupported for name in row.pipelines}
    assert not tested & (excused | set(WITHOUT_CASE))
    missing = video_pipelines() - tested - excused - set(WITHOUT_CASE)
    assert sorted(missing) == []


def test_the_control_pipeline_of_easyanimate_fails_without_vidaccel_too():
    """Goes when Diffusers mends it: then it gets a case."""
    found = easyanimate()
    pipe = diffusers.EasyAnimateControlPipeline(**found.pipe.components)
    with pytest.raises(TypeError, match="unexpected keyword argument 'text_encoder_index'"):
        pipe(control_video=torch.zeros(1, 3, 5, 16, 16), **found.kwargs)


def test_numbers_and_refusals_say_why():
    for row in HOSTS.values():
        assert row.family
        assert (row.threshold is None) == (not row.threshold_origin)
        assert row.unsupported or (row.attention is None) == bool(row.attention_note)


def test_the_readme_shows_the_table():
    readme = (ROOT / "vidaccel" / "hosts" / "README.md").read_text(encoding="utf-8")
    assert markdown_table() in readme
    assert left_out_list() in readme


def test_an_unsupported_family_says_why():
    cls = type("AnyFlowFARTransformer3DModel", (torch.nn.Module,), {})
    pipe = SimpleNamespace(components={"transformer": cls()})
    with pytest.raises(UnsupportedPipelineError, match=r"AnyFlowFARTransformer3DModel fills a key"):
        accelerate(pipe)


def test_a_row_can_be_replaced(monkeypatch):
    monkeypatch.setattr("vidaccel.hosts.registry.HOSTS", {**HOSTS})
    row = HostSpec("WanTransformer3DModel", (), (BlockList("blocks"),), threshold=0.5)
    assert register_host(row) is row
    assert find_transformers(wan().pipe)["transformer"][1] is row


def test_rows_that_cannot_work_are_refused():
    with pytest.raises(UnsupportedPipelineError, match="names no block list"):
        register_host(HostSpec("MyTransformer", ()))
    with pytest.raises(UnsupportedPipelineError, match="reads y, but its blocks return hidden_st"):
        register_host(HostSpec("MyTransformer", (), (BlockList("b"),), (Head("head", ("y",)),)))
    assert "MyTransformer" not in HOSTS
