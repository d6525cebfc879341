"""What is sent arrives whole in one commit or not at all, and what goes wrong is said in one sentence."""

from __future__ import annotations

import logging
import os

import pytest
from huggingface_hub import HfApi, constants

from hfscratch.errors import MachineError, UsageError
from hfscratch.hub import upload
from hfscratch.hub.upload import Outgoing
from tests.hub.fake_hub import READ_TOKEN, Fault, own_hub

REPO = "someone/tiny"
CARD = b"---\nlibrary_name: transformers\n---\n\n# tiny\n"
SIZES = {"model.safetensors": 1_400_000, "onnx/model.onnx": 1_100_000, "onnx/model_q4.onnx": 300_000}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with own_hub(monkeypatch, tmp_path) as served:
        yield served


@pytest.fixture
def files(tmp_path):
    """A card, a configuration and three large files, two of which are sent one by one."""
    made = [Outgoing("README.md", CARD), Outgoing("config.json", b'{"model_type": "llama"}\n')]
    for number, (name, size) in enumerate(SIZES.items()):
        path = tmp_path / f"large-{number}"
        path.write_bytes(os.urandom(size))
        made.append(Outgoing(name, path))
    return made


def push(files, *, repo_id=REPO, is_private=True):
    with upload.hub_errors(repo_id):
        upload.log_in()
        return upload.send(files, repo_id, is_private=is_private, message="Upload tiny")


def content(file):
    return file.content if isinstance(file.content, bytes) else file.content.read_bytes()


def test_every_file_arrives_byte_for_byte_in_one_commit(hub, files):
    sent = push(files)
    repo = hub.repos[REPO]
    assert {path: blob.content for path, blob in repo.files.items() if path != ".gitattributes"} == {
        file.name: content(file) for file in files
    }
    assert len(repo.commits) == 2 and repo.private
    assert sent.commit == repo.head and sent.url == f"{hub.url}/{REPO}"
    assert not (sent.differences or sent.unchanged or sent.replaced or sent.deleted or sent.kept)


def test_large_files_arrive_in_parts_where_the_hub_asks_for_parts(hub, files):
    hub.chunk_size = 500_000
    assert not push(files).differences
    assert hub.asked("PUT", "/lfs/") == 3 + 3 + 1
    assert hub.repos[REPO].files["model.safetensors"].content == content(files[2])


def test_a_second_push_of_the_same_sends_nothing_and_makes_no_commit(hub, files):
    first = push(files)
    hub.journal.clear()
    second = push(files)
    assert second.commit == first.commit and set(second.unchanged) == {file.name for file in files}
    assert not hub.asked("PUT", "") and not hub.asked("POST", "/commit/")


def test_an_upload_that_breaks_off_once_is_taken_up_again(hub, files):
    hub.faults.append(Fault("PUT", "/lfs/", "break", times=1))
    assert not push(files).differences
    assert hub.asked("PUT", "/lfs/") == 4


def test_after_an_upload_that_broke_off_for_good_the_repository_is_as_it_was_and_only_the_rest_is_sent(hub, files):
    last = files[-2]  # the second of the two that go alone
    hub.faults.append(Fault("PUT", last.sha256, "break"))
    with pytest.raises(MachineError, match=r"broke off .*run the same command later"):
        push(files)
    repo = hub.repos[REPO]
    assert list(repo.files) == [".gitattributes"] and len(repo.commits) == 1
    arrived = [file.sha256 for file in files if file.sha256 in hub.large]
    assert files[2].sha256 in arrived and last.sha256 not in arrived

    hub.faults.clear()
    hub.journal.clear()
    assert not push(files).differences
    assert [path for method, path in hub.journal if method == "PUT"] == [f"/lfs/{last.sha256}"]
    assert set(repo.files) == {".gitattributes", *(file.name for file in files)}


def test_a_commit_that_fails_leaves_the_model_that_stood_there(hub, files):
    push(files)
    before = hub.repos[REPO].head
    hub.faults.append(Fault("POST", "/commit/", 500))
    changed = [Outgoing("model.safetensors", os.urandom(20_000)), *files[:2]]
    with pytest.raises(MachineError, match="the Hub is out of order"):
        push(changed)
    assert hub.repos[REPO].head == before


def test_the_list_says_what_is_replaced_deleted_and_left_alone_before_it_is(hub, files, caplog):
    stood = {
        "model.safetensors": b"other weights",
        "model-00001-of-00002.safetensors": b"half of other weights",
        "chat_template.jinja": b"{{ messages }}",
        "onnx/model_fp16.onnx": b"another graph",
        "LICENSE": b"mine",
        "demo.py": b"print(1)",
        "images/loss.png": b"\x89PNG",
    }
    hub.add_repo(REPO, files=stood)
    with caplog.at_level(logging.INFO, logger="hfscratch"):
        sent = push(files)
    assert sent.replaced == ("model.safetensors",)
    assert sent.deleted == ("model-00001-of-00002.safetensors", "chat_template.jinja", "onnx/model_fp16.onnx")
    assert sent.kept == ("LICENSE", "demo.py", "images/loss.png")
    assert set(hub.repos[REPO].files) == {".gitattributes", *sent.kept, *(file.name for file in files)}
    assert not sent.differences
    assert [record.message for record in caplog.records if record.name.startswith("hfscratch")] == [
        f"in {REPO} will be replaced: model.safetensors",
        f"in {REPO} will be deleted: {', '.join(sent.deleted)}",
        f"in {REPO} will be left alone: {', '.join(sent.kept)}",
    ]


def test_what_changed_between_the_list_and_the_commit_is_not_overwritten(hub, files):
    stood = hub.add_repo(REPO, files={"config.json": b"{}"})

    class Racing(list):
        """The journal, in which a request to preupload has somebody else commit first."""

        def append(self, request):
            super().append(request)
            if "/preupload/" in request[1]:
                stood.commit(dict(stood.files))

    hub.journal = Racing()
    with pytest.raises(MachineError, match="was changed by somebody else meanwhile"):
        push(files)
    assert stood.files["config.json"].content == b"{}"


def test_a_file_that_the_repository_holds_otherwise_is_named(hub, files, monkeypatch):
    send_list = HfApi.list_repo_tree

    def damaged(self, *args, **kwargs):
        repo = hub.repos[REPO]
        if "config.json" in repo.files:
            repo.files["config.json"].content = b'{"model_type": "llamo"}\n'
            repo.files.pop("onnx/model_q4.onnx", None)
        return send_list(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "list_repo_tree", damaged)
    assert push(files).differences == ("config.json has other bytes", "onnx/model_q4.onnx is missing")


def test_a_private_push_does_not_go_into_a_public_repository(hub, files):
    repo = hub.add_repo(REPO, private=False)
    with pytest.raises(UsageError, match=r"everybody can read it.*set push.private=false"):
        push(files)
    assert len(repo.commits) == 1 and not hub.large
    assert not push(files, is_private=False).is_private


def test_a_card_that_the_hub_does_not_accept_is_refused_before_anything_is_made(hub, files):
    card = Outgoing("README.md", CARD.replace(b"library_name", b"license: apache\nlibrary_name"))
    with pytest.raises(UsageError, match=r'does not accept .*"license" must be one of .*push.license'):
        push([card, *files[1:]])
    assert not hub.repos and not hub.large


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (Fault("GET", "/api/whoami-v2", 500), r"out of order \(500: as the test has it\)"),
        (Fault("GET", "/api/whoami-v2", 429), "asks for patience"),
        (Fault("GET", "/api/whoami-v2", "break"), r"cannot be reached or broke off"),
        (Fault("POST", "/api/validate-yaml", 503), "out of order"),
        (Fault("POST", "/api/repos/create", 403), "may not write to someone/tiny"),
        (Fault("POST", "/api/repos/create", 500), "out of order"),
        (Fault("GET", "/api/models/someone/tiny", 404, code="RepoNotFound"), "no repository someone/tiny"),
        (Fault("POST", "/preupload/", 503), "out of order"),
        (Fault("POST", "/preupload/", 403), "may not write to someone/tiny"),
        (Fault("POST", "/info/lfs/objects/batch", 502), "out of order"),
        (Fault("POST", "/info/lfs/objects/batch", 401), "does not accept this machine's token"),
        (Fault("PUT", "/lfs/", 500), "out of order"),
        (Fault("PUT", "/lfs/", 403), "may not write"),
        (Fault("POST", "/verify", 404), "no repository"),
        (Fault("POST", "/commit/", 403), "may not write"),
        (Fault("POST", "/commit/", 400), r"refused to take someone/tiny \(400: as the test has it\)"),
        (Fault("POST", "/commit/", "break"), "broke off"),
    ],
    ids=lambda each: f"{each.part}-{each.does}" if isinstance(each, Fault) else "",
)
def test_whatever_the_hub_refuses_is_one_sentence_and_no_half_model(hub, files, fault, sentence):
    hub.faults.append(fault)
    with pytest.raises(MachineError, match=sentence) as raised:
        push(files)
    assert "\n" not in str(raised.value)
    assert all(list(repo.files) == [".gitattributes"] for repo in hub.repos.values())


def test_a_hub_that_says_nothing_is_not_waited_for(hub, files, monkeypatch):
    monkeypatch.setattr(upload, "SILENCE_TIMEOUT_S", 0.2)
    hub.faults.append(Fault("GET", "/api/whoami-v2", "silence"))
    with pytest.raises(MachineError, match=r"cannot be reached or broke off \(.*timed out"):
        push(files)


def test_a_token_that_may_only_read_is_refused_before_anything_is_made(hub, files, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    with pytest.raises(MachineError, match="token of someone may only read"):
        push(files)
    assert [path for _, path in hub.journal if "harness" not in path] == ["/api/whoami-v2"]


@pytest.mark.parametrize(("token", "sentence"), [("hf_wrong", "does not accept this machine's token"), (None, "log")])
def test_a_wrong_token_and_none_are_told_apart(hub, files, monkeypatch, token, sentence):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(MachineError, match=sentence):
        push(files)


def test_a_name_of_somebody_elses_is_refused(hub, files):
    with pytest.raises(MachineError, match=r"may not write to other/tiny .*rights to write to other/tiny"):
        push(files, repo_id="other/tiny")


@pytest.mark.parametrize(("status", "sentence"), [(404, "set HF_HUB_DISABLE_XET=1"), (403, "may not write")])
def test_what_the_hub_refuses_to_xet_is_told_as_well(hub, files, monkeypatch, status, sentence):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.faults.append(Fault("GET", "/xet-write-token/", status))
    with pytest.raises(MachineError, match=sentence):
        push(files)
    assert list(hub.repos[REPO].files) == [".gitattributes"]


def test_offline_mode_is_named(hub, files, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match="HF_HUB_OFFLINE is set"):
        push(files)


def test_no_hub_at_all_is_named_with_its_address(hub, files, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MachineError, match=r"the Hub at http://127\.0\.0\.1:9 cannot be reached"):
        push(files)


def test_a_bug_of_ours_is_no_sentence_of_the_hubs(hub):
    with pytest.raises(KeyError), upload.hub_errors(REPO):
        raise KeyError("ours")


@pytest.mark.parametrize("name", ["a/b/c", "-tiny", "someone/ti ny", "someone/a--b", "x.git", "", "a" * 97, "someone/"])
def test_what_is_no_name_on_the_hub_is_refused_without_asking_it(name):
    with pytest.raises(UsageError, match="which is no name on the Hub"):
        upload.check_repo_id(name)
