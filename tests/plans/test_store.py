"""Policies as files, folders and on the hub: round trips, and what is no policy file."""

import json
import random
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError

from tiny.policies import forecasting, parse, valid
from vidaccel.errors import PolicyError
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.store import MAX_BYTES


def test_a_file_round_trips(tmp_path):
    policy = parse(valid())
    file = tmp_path / "deep" / "policy.json"
    policy.save(file)
    assert CachePolicy.load(file) == policy
    assert [p.name for p in file.parent.iterdir()] == ["policy.json"]
    text = file.read_text()
    assert "[0, 2, 4, 5]" in text  # a step list on one line
    keys = list(json.loads(text))
    assert keys == sorted(keys)
    policy.save(file)
    assert file.read_text() == text


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'"text"',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        json.dumps(valid()).encode()[:-40],
        json.dumps(valid()).replace("0.25", "NaN").encode(),
        json.dumps(valid()).replace("0.25", "Infinity").encode(),
        json.dumps(valid()).replace("0.25", "1e999").encode(),
        json.dumps(valid()).replace("0.25", "9" * 5000).encode(),
        json.dumps(valid()).replace('"frames"', '"width"').encode(),
    ],
    ids=range(14),
)
def test_what_is_no_policy_is_refused(raw, tmp_path):
    file = tmp_path / "policy.json"
    file.write_bytes(raw)
    with pytest.raises(PolicyError) as caught:
        CachePolicy.load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_too_large_or_missing(tmp_path):
    file = tmp_path / "policy.json"
    for size in (MAX_BYTES + 1, 1 << 30):
        with file.open("wb") as stream:
            stream.truncate(size)
        with pytest.raises(PolicyError, match="larger than 32 MiB"):
            CachePolicy.load(file)
    with pytest.raises(PolicyError, match="cannot read policy"):
        CachePolicy.load(tmp_path / "nothing.json")


def test_mutations_are_accepted_or_refused_but_never_crash():
    """Thousands of random edits of a valid file: only PolicyError may come out."""
    rng = random.Random(0)
    text = json.dumps(valid())
    values = [None, True, -1, 0, 1e308, -0.0, "", "..", [], {}, [[]], "x" * 300, 10**30, 0.1]
    refused = 0
    for round_ in range(4000):
        if round_ % 2:
            data = valid()
            target, key = data, rng.choice(list(data))
            while isinstance(target[key], dict | list) and target[key] and rng.random() < 0.7:
                target = target[key]
                key = rng.choice(list(target) if isinstance(target, dict) else range(len(target)))
            target[key] = rng.choice(values)
            mutated = json.dumps(data)
        else:
            i = rng.randrange(len(text))
            mutated = text[:i] + rng.choice('{}[]",:0-e.N\\ \x00') + text[i + rng.randrange(3) :]
        try:
            CachePolicy.from_json(mutated)
        except PolicyError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 2000


class Hub:
    """Stands in for the hub where huggingface_hub would reach the network."""

    def __init__(self, folder):
        self.folder = folder

    def api(self, token=None):
        assert token == "secret"
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        if "/" not in repo_id:
            raise HFValidationError("a name is user/name")
        (self.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        assert private is True
        return SimpleNamespace(repo_id=repo_id)

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, commit_message):
        (self.folder / repo_id / path_in_repo).write_bytes(path_or_fileobj)
        return SimpleNamespace(commit_url=f"hub/{repo_id}: {commit_message}")

    def download(self, repo_id, filename, *, revision, token):
        assert (revision, token) == ("v1", "secret")
        return str(self.folder / repo_id / filename)


def test_a_policy_travels_through_the_hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, *, token: url)
    policy = parse(forecasting())
    url = policy.push_to_hub("someone/policy", private=True, token="secret")
    assert url == "hub/someone/policy: Upload a policy of 6 steps"
    again = CachePolicy.from_pretrained("someone/policy", revision="v1", token="secret")
    assert again == policy
    with pytest.raises(PolicyError, match="cannot upload the policy to nowhere: a name is"):
        policy.push_to_hub("nowhere", private=True, token="secret")


def test_a_hub_that_has_it_not_or_is_not_there_is_asked_once(monkeypatch):
    asked = []

    class Unreachable(Exception):
        """Stands in for the errors of whatever HTTP library the hub's client uses."""

    def metadata(url, *, token):
        asked.append(url)
        raise Unreachable("[Errno 111] Connection refused\nmore of it")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    with pytest.raises(PolicyError) as caught:
        CachePolicy.from_pretrained("someone/else", revision="v1")
    message = "no policy file or folder someone/else, and not on the hub: [Errno 111] Connection"
    assert str(caught.value) == f"{message} refused"
    (url,) = asked
    assert "someone/else" in url and "v1" in url


def test_a_policy_in_a_folder(tmp_path):
    policy = parse(valid())
    policy.save_pretrained(tmp_path / "policy")
    assert CachePolicy.from_pretrained(tmp_path / "policy") == policy
