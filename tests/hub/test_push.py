"""`moma export --push`, against a server with the endpoints of the Hugging Face Hub."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.command_line import moma, refuses, succeeds
from tests.hub.hub_server import TOKEN, running_hub


@pytest.fixture
def hub(monkeypatch):
    """A hub that `huggingface_hub` has taken from the environment."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def files_of(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_an_export_is_one_commit_to_a_private_repository(trained, hub, tmp_path):
    out = tmp_path / "model"
    printed = succeeds("export", trained / "run", out, "--push", "me/my-model")
    assert printed == f"exported {out}\nuploaded {hub.url}/me/my-model\n"
    assert hub.repos["me/my-model"] == {".gitattributes": b""} | files_of(out)
    assert hub.private == {"me/my-model": True} and hub.commits == {"me/my-model": 1}
    card = (out / "README.md").read_text()
    assert 'from_pretrained("me/my-model")' in card
    assert "hf download me/my-model --local-dir model" in card


def test_without_push_the_network_is_not_used(trained, hub, tmp_path):
    succeeds("export", trained / "run", tmp_path / "model")
    assert not hub.requests


def test_an_upload_that_failed_goes_on_with_the_command_of_the_message(trained, hub, tmp_path):
    out = tmp_path / "my model"
    hub.refused = 1
    outcome = moma("export", trained / "run", out, "--push", "my-model", "--public")
    assert outcome.code == 2 and not hub.commits
    reason, command = outcome.err.splitlines()[-1].split("then go on with: ")
    assert "the storage is full" in reason
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    program, *arguments = shlex.split(command)
    path = Path(sys.executable).with_name(program)
    hub.repos["me/my-model"]["codec/old"] = b""
    subprocess.run([path, *arguments], env=environment, check=True)
    assert hub.repos["me/my-model"] == {".gitattributes": b""} | files_of(out)
    assert hub.private == {"me/my-model": False} and hub.commits == {"me/my-model": 1}


def test_weights_of_an_earlier_upload_are_replaced(trained, hub, tmp_path):
    hub.repos["me/my-model"] = dict.fromkeys(
        ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "codec/old", "notes"],
        b"",
    )
    out = tmp_path / "model"
    succeeds("export", trained / "run", out, "--push", "me/my-model")
    assert hub.repos["me/my-model"] == {"notes": b""} | files_of(out)
    assert hub.commits == {"me/my-model": 1}


def test_a_folder_that_exists_is_not_uploaded(trained, hub, tmp_path):
    """Its weights may be those of another run."""
    message = refuses("export", trained / "run", tmp_path, "--push", "me/my-model")
    assert f"{tmp_path}: exists already" in message and not hub.requests


def test_what_the_hub_refuses_is_one_clear_line(trained, hub, tmp_path, monkeypatch):
    def refusal(repo):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        outcome = moma("export", trained / "run", out, "--push", repo)
        assert outcome.code == 2 and "Traceback" not in outcome.err
        return outcome.err.splitlines()[-1]

    assert "--push others/model: You don't have the rights" in refusal("others/model")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = refusal("me/my-model")
    assert "Invalid" in message and "hf auth login" in message
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "Connection refused" in refusal("me/my-model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal("me/my-model")


def test_a_name_or_a_login_that_is_missing_is_refused_before_the_export(
    trained, hub, tmp_path, monkeypatch
):
    out = tmp_path / "model"
    for name in ("a/b/c", "me/my model", "-me"):
        assert "is not a name of the Hub" in refuses("export", trained / "run", out, "--push", name)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    message = refuses("export", trained / "run", out, "--push", "me/my-model")
    assert "there is no token" in message
    assert "--public: no effect" in refuses("export", trained / "run", out, "--public")
    assert not out.exists() and not hub.requests


@pytest.mark.slow
def test_the_environment_names_the_hub(trained, tmp_path):
    environment = os.environ | {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    with running_hub() as hub:
        command = [sys.executable, "-m", "moma", "export", str(trained / "run")]
        subprocess.run(
            [*command, str(tmp_path / "model"), "--push", "my-model"],
            env=environment | {"HF_ENDPOINT": hub.url},
            check=True,
        )
        assert hub.commits == {"me/my-model": 1}
