"""The configuration text of the embedded server, and the credentials in it."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace as replace_fields
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from computemesh.contracts.base import Role
from computemesh.nats_server import (
    BadCredentialsError,
    Credentials,
    ServerConfig,
    add_node,
    load_or_create,
    render,
    render_accounts,
    users,
)
from computemesh.nats_server.credentials import generate, remove_node

CONFIG = ServerConfig(
    store_dir=Path("/m/store"), ports_file_dir=Path("/m/ports"), pid_file=Path("/m/pid"), accounts_file="accounts.conf"
)

TEXT = """\
listen: "127.0.0.1:-1"
ports_file_dir: "/m/ports"
pid_file: "/m/pid"
jetstream {
  store_dir: "/m/store"
}
include "accounts.conf"
"""


def test_a_configuration_is_rendered_as_text() -> None:
    """The whole file, as the server reads it."""
    assert render(CONFIG) == TEXT


def test_limits_and_durability_are_written_only_when_asked_for() -> None:
    """What is left out is the server's default."""
    text = render(replace_fields(CONFIG, max_file_store_bytes=1024, sync_always=True, port=4222))
    assert "  max_file_store: 1024\n  sync_interval: always\n" in text
    assert 'listen: "127.0.0.1:4222"' in text


def test_odd_characters_in_a_path_are_quoted() -> None:
    """A folder's name cannot end the string that holds it."""
    text = render(replace_fields(CONFIG, store_dir=Path('/m/a "b"\\c\n\x01é')))
    assert r'store_dir: "/m/a \"b\"\\c\x0a\x01é"' in text


def with_nodes(*node_ids: str) -> Credentials:
    return replace(generate(), nodes={node_id: "x" * 20 + node_id for node_id in node_ids})


def test_every_role_and_every_node_is_a_user_with_a_password_of_its_own() -> None:
    """Nobody can connect as somebody else."""
    credentials = with_nodes("b", "a")
    made = [user for role in Role for user in users(credentials, role)]
    assert [user.name for user in made] == ["services", "node-a", "node-b", "client", "observer"]
    assert len({user.password for user in made}) == len(made)


def test_only_the_services_account_has_jetstream() -> None:
    """Nobody else can make a stream, or fill the store."""
    text = render_accounts(with_nodes())
    assert text.count("jetstream") == 1
    assert "  MESH {\n    jetstream: enabled\n" in text


def test_a_crossing_is_an_export_here_and_an_import_there() -> None:
    """Each side names the other, so that no account can import what is not meant for it."""
    text = render_accounts(with_nodes())
    assert '{ service: "compute.work.cancel.v1", accounts: [CLIENTS] }' in text
    assert '{ service: { account: MESH, subject: "compute.work.cancel.v1" } }' in text
    assert '{ service: "$SRV.PING", accounts: [CLIENTS, OBSERVERS], response_type: stream }' in text


def test_credentials_are_made_once_and_kept(tmp_path: Path) -> None:
    """The second start uses what the first one made, in a file for its owner only."""
    path = tmp_path / "new" / "credentials.json"
    made = load_or_create(path)
    assert load_or_create(path) == made
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(file.name for file in path.parent.iterdir()) == [".credentials.json.lock", path.name]


def test_credentials_made_by_many_at_once_are_the_same(tmp_path: Path) -> None:
    """Whoever comes second takes what the first one made."""
    path = tmp_path / "credentials.json"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(load_or_create, [path] * 8))
    assert all(one == made[0] for one in made)


def test_nodes_added_by_many_at_once_are_all_kept(tmp_path: Path) -> None:
    """Nobody overwrites what another one added meanwhile."""
    path = tmp_path / "credentials.json"
    names = [f"n{number}" for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add_node, [path] * 16, names))
        list(pool.map(remove_node, [path] * 8, names[::2]))
    assert sorted(load_or_create(path).nodes) == sorted(names[1::2])


def test_a_node_keeps_its_password(tmp_path: Path) -> None:
    """Adding it again changes nothing; added after it was removed, it has another."""
    path = tmp_path / "credentials.json"
    first = add_node(path, "n1").nodes["n1"]
    assert add_node(path, "n1").nodes["n1"] == first
    remove_node(path, "n1")
    assert add_node(path, "n1").nodes["n1"] != first


def test_credentials_others_could_read_are_made_private_again(tmp_path: Path) -> None:
    """Copying a file about easily loosens its mode."""
    path = tmp_path / "credentials.json"
    made = load_or_create(path)
    path.chmod(0o644)
    assert load_or_create(path) == made
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("text", [b"", b"{}", b"\xff", b'{"services": "short"}', b"[" * 100_000])
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
    made = with_nodes("a")
    assert not any(secret in repr(made) for secret in (made.client, made.nodes["a"]))
