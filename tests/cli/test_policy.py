"""`vidaccel build-policy` and `vidaccel show`, and the policy files that commands take."""

import json
import re
import socket
from pathlib import Path

import pytest

from vidaccel.errors import PolicyError
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.store import shipped_policies


def test_a_policy_from_the_command_line_to_a_clip(tmp_path, run):
    prompts, policy, out = tmp_path / "prompts.txt", tmp_path / "policy.json", tmp_path / "clip.mp4"
    prompts.write_text(
        "a green dotted square moving left on a maroon striped background\n\n"
        "a cyan striped circle moving up on a charcoal dotted background\n"
    )
    size = ["--size", "64x64", "--frames", 9, "--steps", 6, "--device", "cpu"]
    build = ["build-policy", policy, "--prompts", prompts, *size, "--max-skip", 3]
    code, stdout, stderr = run(*build, "--method", "gain")
    assert code == 0, stderr
    assert "generations" in stderr
    code, shown, _ = run("show", policy)
    assert code == 0 and shown == stdout
    assert "CCCCCC" in shown and "dB" in shown
    picture = tmp_path / "policy.png"
    code, again, stderr = run("show", policy, "--plot", picture)
    assert code == 0 and again == shown and f"wrote {picture}" in stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, _, stderr = run("show", policy, "--plot", tmp_path / "policy.xyz")
    assert code == 2 and "cannot write" in stderr
    generate = ["generate", *size, "--policy", policy, "--out", out]
    wishes = {("--budget", 3): 3, ("--speedup", 2): 3, ("--preset", "fast"): 2}
    for wish, computed in wishes.items():
        code, stdout, stderr = run(*generate, *wish, "--json", "-")
        assert code == 0, stderr
        timeline = json.loads(stdout)["report"]["transformers"][0]["timeline"]
        assert len(timeline) == 6 and timeline.count("C") == computed
    code, _, stderr = run(*generate, "--budget", 1)
    assert code == 2 and "budget: found 1" in stderr
    code, _, stderr = run(*generate, "--steps", 7, "--budget", 3)
    assert code == 2 and "the policy is for 6, this run has 7" in stderr


@pytest.fixture
def no_network(monkeypatch):
    """Make every look at a hub or a network fail the test."""

    def refuse(*_, **__):
        raise AssertionError("a network was asked")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_show_lists_the_policies_that_come_with_vidaccel(run, no_network):
    code, stdout, _ = run("show")
    assert code == 0 and len(stdout.splitlines()) == len(shipped_policies()) + 2
    for line in stdout.splitlines()[2:]:
        assert run("show", line.split()[0])[0] == 0  # under the name that is listed
    code, _, stderr = run("show", "--plot", "a.png")
    assert code == 2 and "name it" in stderr


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("vidaccel/tiny-wan", [30, 50]),
        ("vidaccel--tiny-wan", [30, 50]),
        ("vidaccel/tiny-wan/30-steps", [30]),
        ("vidaccel--tiny-wan/50-steps.json", [50]),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", [50]),
    ],
)
def test_show_finds_a_shipped_policy_and_asks_no_hub(name, steps, run, no_network):
    code, stdout, stderr = run("show", name)
    assert code == 0, stderr
    assert [int(n) for n in re.findall(r": (\d+) steps, ", stdout)] == steps


def test_a_shipped_policy_is_read_by_its_name_from_python(no_network):
    policy = CachePolicy.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert policy.provenance == "published"
    with pytest.raises(PolicyError, match=r"several policies: .*/30-steps.json, .*/50-steps.json"):
        CachePolicy.from_pretrained("vidaccel/tiny-wan")


def test_a_folder_of_that_name_is_read_first(tmp_path, run):
    policy = CachePolicy.from_pretrained("vidaccel/tiny-wan/30-steps")
    one = policy.model_copy(update={"plans": {"30": policy.plans["30"]}, "validation": None})
    one.save_pretrained(tmp_path / "vidaccel" / "tiny-wan")  # the folder that tests run in
    assert len(run("show", "vidaccel/tiny-wan")[1].splitlines()) == 4


def test_rows_without_an_error_or_a_psnr_say_why(run):
    _, stdout, _ = run("show", "vidaccel/tiny-wan/50-steps")
    rows = [line for line in stdout.splitlines() if re.match(r" +\d+ ", line)]
    assert len(rows) == 44 and not any("  -  " in row for row in rows)
    assert all(re.search(r"\d dB|not run|identical", row) for row in rows)
    assert all(re.search(r"x +(\d\S*|not measured) ", row) for row in rows)
    assert "not run: only the budgets 10, 12, 16, 25, 33, 37 were run end to end" in stdout
    assert "not measured: a plan that was chosen by runs end to end" in stdout
    _, stdout, _ = run("show", "Wan-AI/Wan2.1-T2V-14B-Diffusers")
    assert "not measured: published lists come without the errors" in stdout
    assert "not run: no plan of this policy was run end to end" in stdout


def test_a_build_says_what_it_will_cost_and_goes_on_where_it_stood(tmp_path, run):
    prompts, work = tmp_path / "prompts.txt", tmp_path / "work"
    prompts.write_text("a red circle moving up\na blue square\na green ring\n", encoding="utf-8")
    size = ["--size", "32x32", "--frames", 5, "--steps", 5, "--max-skip", 2, "--device", "cpu"]
    build = ["build-policy", tmp_path / "p.json", "--prompts", prompts, *size, "--workdir", work]
    code, _, first = run(*build)
    assert code == 0, first
    lines = first.splitlines()
    assert lines[0] == "3 prompts: 2 x 1 seed = 2 samples to measure, 1 prompt kept for validation"
    assert re.match(r"2 samples, exact: \d+ forwards, ", lines[1])
    validating = re.match(r"validation, end to end: at most (\d+) forwards, ", lines[2])
    assert lines[3].startswith("in all: at most ")
    runs = [int(n) for n in re.findall(r"validation: +\d+%.*?(\d+)/\d+ ", first)]
    assert 0 < runs[-1] <= int(validating[1])
    assert "| 0.0/" in first.replace("|          |", "|")
    for shard in work.glob("sample-0001-0003*"):
        shard.unlink()
    code, _, second = run(*build)
    assert code == 0, second
    before = re.search(r"measured before, by the work folder: (\d+) forwards", second)
    bars = [float(n) for n in re.findall(r"\| (\d+\.\d)/\d+ generations", second)]
    assert bars[0] == int(before[1]) / 5 > 0  # it begins where the first build stood
    ends = [re.findall(r"\| (\d+\.\d)/(\d+) generations", text)[-1] for text in (first, second)]
    assert ends[0] == ends[1] and abs(float(ends[0][0]) - int(ends[0][1])) <= 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "47x47"], "have to be divisible by 16 but are 47 and 47"),
        (["--steps", 5, "--max-skip", 5], "max_skip: found 5, expected 2 to 4"),
        (["--objective", "least"], "least"),
        (["--guidance", "nan"], "expected a number: 'nan'"),
        (["--device", "cuda:99"], "there is no device cuda:99 here"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_build_that_cannot_be_is_refused_before_the_model_is_loaded(
    options, message, tmp_path, run, no_weights
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moving up\na blue square\n", encoding="utf-8")
    code, _, stderr = run("build-policy", tmp_path / "p.json", "--prompts", prompts, *options)
    assert code == 2 and message in stderr and stderr.count("\n") == 1


def test_workers_without_ray_are_refused_before_the_model_is_loaded(run, no_weights, monkeypatch):
    Path("prompts.txt").write_text("a red circle\na blue square\n", encoding="utf-8")
    monkeypatch.setattr("vidaccel.calibration.build.find_spec", lambda name: None)
    code, _, stderr = run("build-policy", "p.json", "--prompts", "prompts.txt", "--workers", 2)
    assert code == 2 and 'pip install "vidaccel[ray]"' in stderr


@pytest.mark.parametrize("wish", [[], ["--speedup", "1.5"]], ids=" ".join)
def test_generate_opens_a_policy_file_once(wish, tmp_path, run, monkeypatch):
    prompts, policy = tmp_path / "prompts.txt", tmp_path / "policy.json"
    prompts.write_text("a green dotted square moving left on a maroon striped background\n")
    size = ["--size", "32x32", "--frames", 5, "--steps", 6, "--device", "cpu"]
    build = ["build-policy", policy, "--prompts", prompts, *size, "--max-skip", 2]
    assert run(*build, "--method", "gain", "--no-validate")[0] == 0
    opened, load = [], CachePolicy.load
    monkeypatch.setattr(CachePolicy, "load", lambda path: opened.append(str(path)) or load(path))
    generate = ["generate", *size, "--policy", policy, "--compare", "--out", tmp_path / "a.mp4"]
    code, stdout, stderr = run(*generate, *wish)
    assert code == 0, stderr
    assert opened == [str(policy)] and "of 6" in stdout


@pytest.mark.parametrize(
    ("prompts", "message"),
    [(b"", "holds no prompt"), (b" \n\n", "holds no prompt"), (b"\xff\xfe", "not UTF-8")],
)
def test_prompt_files_that_are_none(prompts, message, tmp_path, run):
    file = tmp_path / "prompts.txt"
    file.write_bytes(prompts)
    code, _, stderr = run("build-policy", tmp_path / "p.json", "--prompts", file)
    assert code == 2 and message in stderr
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", 2], "expected a whole number of 3 or more: '2'"),
        (["--steps", 5, "--max-skip", 5], "max_skip: found 5, expected 2 to 4"),
        (["--steps", 5, "--max-skip", 1], "expected a whole number of 2 or more: '1'"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_steps_and_segments_that_no_policy_has(options, message, tmp_path, run):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n", encoding="utf-8")
    arguments = ["build-policy", tmp_path / "p.json", "--prompts", prompts, *options]
    code, _, stderr = run(*arguments)
    assert code == 2 and message in stderr and "Traceback" not in stderr
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize("command", ["show", "generate"])
@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "found nothing in it"),
        (b'{"schema_version": "1.0", "pl', "invalid JSON: Unterminated string"),
        (b"\xff\xfe", "invalid JSON: 'utf-8' codec"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"schema_version": NaN}', "NaN"),
        (b'{"schema_version": "2.0"}', "schema_version: found '2.0', expected '1.x'"),
        (b'{"schema_version": "1.0", "plans": 3}', "model: Field required"),
        (b"[]", "found list, expected an object"),
    ],
)
def test_a_damaged_policy_is_one_line(command, raw, message, tmp_path, run, small):
    file = tmp_path / "policy.json"
    file.write_bytes(raw)
    arguments = [file] if command == "show" else [*small, "--policy", file]
    code, stdout, stderr = run(command, *arguments)
    assert code == 2 and message in stderr
    assert "Traceback" not in stderr and not stdout
    assert "step/s" not in stderr  # nothing was generated
