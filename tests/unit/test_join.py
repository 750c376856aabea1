"""Invitations: what `nodes invite` prints, in each form in which it may come back."""

from __future__ import annotations

import pytest

from computemesh.cli.common import Failure
from computemesh.cli.join import Invitation, read_invitation

URL = "nats://node-gpu-7:a-password-1234567890@mesh.example:4222"
EXPECTED = Invitation(nats_url=URL, node_id="gpu-7")


@pytest.mark.parametrize(
    "text",
    [
        f"export NATS_URL={URL}\nexport NATS_INBOX_PREFIX=_INBOX_node.gpu-7\nexport COMPUTEMESH_NODE_ID=gpu-7\n",
        f"export NATS_URL='{URL}'\r\n",
        f"# from the mesh\nNATS_URL={URL}\n",
        f'{{"NATS_URL": "{URL}", "NATS_INBOX_PREFIX": "_INBOX_node.gpu-7", "COMPUTEMESH_NODE_ID": "gpu-7"}}',
        URL,
        f"  {URL}/\n",
        URL.removeprefix("nats://"),
        URL.removesuffix(":4222"),
    ],
    ids=["exports", "quoted", "settings", "json", "address", "blanks", "no scheme", "no port"],
)
def test_an_invitation_is_read_in_every_form_it_is_printed_or_kept_in(text: str) -> None:
    """The user in the address says which node it is."""
    assert read_invitation(text, "here") == EXPECTED


def test_a_server_without_users_lets_the_invitation_name_the_node() -> None:
    """Or nobody."""
    assert read_invitation("NATS_URL=nats://h\nCOMPUTEMESH_NODE_ID=n1", "x") == Invitation(
        nats_url="nats://h:4222", node_id="n1"
    )
    assert read_invitation("tls://[::1]:4333", "x") == Invitation(nats_url="tls://[::1]:4333")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no invitation"),
        ("two words", "no invitation"),
        ("{", "no invitation"),
        ('{"NATS_URL": 7}', "no invitation"),
        ("export NATS_URL='", "no invitation"),
        ("export NATS_URL=", "no invitation"),
        ("http://node-a:secret-secret-secret@h", "no address of a NATS server"),
        ("nats://", "no address of a NATS server"),
        ("nats://h:99999", "no address of a NATS server"),
        ("nats://h/x", "no address of a NATS server"),
        ("NATS_URL='nats://a host'", "no address of a NATS server"),
        ("nats://client:secret-secret-secret@h", "'client' is no user of a node"),
        ("nats://node-a.b:secret-secret-secret@h", "'node-a.b' is no user of a node"),
    ],
)
def test_what_is_no_invitation_is_refused_without_showing_it(text: str, says: str) -> None:
    """It may hold a password."""
    with pytest.raises(Failure, match=says) as failed:
        read_invitation(text, "file.env")
    assert failed.value.message.startswith("file.env: ")
    assert failed.value.field == "invitation"
    assert "secret" not in failed.value.message + failed.value.hint


def test_an_invitation_shows_no_password() -> None:
    """Not even in a traceback."""
    assert "password" not in repr(EXPECTED)
