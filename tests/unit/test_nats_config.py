"""The configuration text of the embedded server, and the credentials in it."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from computemesh.contracts.base import Role
from computemesh.contracts.permissions import Permissions
from computemesh.nats_server import BadCredentialsError, ServerConfig, User, load_or_create, render, users
from computemesh.nats_server.credentials import generate

CONFIG = ServerConfig(
    store_dir=Path("/m/store"),
    ports_file_dir=Path("/m/ports"),
    pid_file=Path("/m/pid"),
    users=(
        User(name="a", password="one", permissions=Permissions(("x.v1",), ("_INBOX.>", "y.v1.*"), False)),
        User(name="b", password="two", permissions=Permissions(("$KV.>",), ("z",), True)),
    ),
)

TEXT = """\
listen: "127.0.0.1:-1"
ports_file_dir: "/m/ports"
pid_file: "/m/pid"
max_payload: 8388608
jetstream {
  store_dir: "/m/store"
}
authorization {
  timeout: 5
  users: [
    {
      user: "a"
      password: "one"
      permissions {
        publish: { allow: ["x.v1"] }
        subscribe: { allow: ["_INBOX.>", "y.v1.*"] }
      }
    }
    {
      user: "b"
      password: "two"
      permissions {
        publish: { allow: ["$KV.>"] }
        subscribe: { allow: ["z"] }
        allow_responses: { max: 1000, expires: "600s" }
      }
    }
  ]
}
"""


def test_a_configuration_is_rendered_as_text() -> None:
    """The whole file, as the server reads it."""
    assert render(CONFIG) == TEXT


def test_limits_and_durability_are_written_only_when_asked_for() -> None:
    """What is left out is the server's default."""
    text = render(replace(CONFIG, max_file_store_bytes=1024, sync_always=True, port=4222))
    assert "  max_file_store: 1024\n  sync_interval: always\n" in text
    assert 'listen: "127.0.0.1:4222"' in text


def test_odd_characters_in_a_path_are_quoted() -> None:
    """A folder's name cannot end the string that holds it."""
    text = render(replace(CONFIG, store_dir=Path('/m/a "b"\\c\n\x01é')))
    assert r'store_dir: "/m/a \"b\"\\c\x0a\x01é"' in text


def test_every_role_is_a_user_with_its_own_password() -> None:
    """Nobody can connect as somebody else."""
    made = users(generate())
    assert [user.name for user in made] == [role.value for role in Role]
    assert len({user.password for user in made}) == len(Role)


def test_credentials_are_made_once_and_kept(tmp_path: Path) -> None:
    """The second start uses what the first one made, in a file for its owner only."""
    path = tmp_path / "new" / "credentials.json"
    made = load_or_create(path)
    assert load_or_create(path) == made
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_credentials_made_by_many_at_once_are_the_same(tmp_path: Path) -> None:
    """Whoever comes second takes what the first one made."""
    path = tmp_path / "credentials.json"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(load_or_create, [path] * 8))
    assert all(one == made[0] for one in made)


def test_credentials_others_could_read_are_made_private_again(tmp_path: Path) -> None:
    """Copying a file about easily loosens its mode."""
    path = tmp_path / "credentials.json"
    made = load_or_create(path)
    path.chmod(0o644)
    assert load_or_create(path) == made
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("text", [b"", b"{}", b"\xff", b'{"services": "short"}'])
def test_a_file_that_holds_no_credentials_is_refused_by_name(tmp_path: Path, text: bytes) -> None:
    """The error says which file, and what to do."""
    path = tmp_path / "credentials.json"
    path.write_bytes(text)
    with pytest.raises(BadCredentialsError, match=r"credentials\.json holds no credentials .* remove it"):
        load_or_create(path)


def test_a_password_that_would_need_quoting_is_refused(tmp_path: Path) -> None:
    """It is put into URLs as it stands."""
    path = tmp_path / "credentials.json"
    fields = msgspec.to_builtins(generate()) | {"client": "p@ss:word/with?more#"}
    path.write_bytes(msgspec.json.encode(fields))
    with pytest.raises(BadCredentialsError, match="client"):
        load_or_create(path)


def test_credentials_show_no_secret() -> None:
    """They may end up in a log line or a traceback."""
    made = generate()
    assert made.client not in repr(made)
