"""`vidaccel build-policy` and `vidaccel show`, and the policy files that commands take."""

import json

import pytest

from vidaccel.plans.policy import CachePolicy


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
    for wish in (["--budget", 3], ["--speedup", 2], ["--preset", "fast"]):
        code, stdout, stderr = run(*generate, *wish, "--json", "-")
        assert code == 0, stderr
        timeline = json.loads(stdout)["report"]["transformers"][0]["timeline"]
        assert len(timeline) == 6 and timeline.count("C") == 3
    code, _, stderr = run(*generate, "--budget", 2)
    assert code == 2 and "budget: found 2" in stderr
    code, _, stderr = run(*generate, "--steps", 7, "--budget", 3)
    assert code == 2 and "made for 6 steps, but this run has 7" in stderr


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
