"""Registers an engine, keeps it registered, and says who is there: `register.py ADDRESS`."""

import sys

from computemesh.nanoctrl import NanoCtrlClient

ENGINE = {
    "role": "prefill",
    "world_size": 8,
    "num_blocks": 15_000,
    "host": "10.0.0.2",
    "port": 6001,
    "peer_addrs": ["10.0.0.2:5000"],
}

if len(sys.argv) != 2:
    sys.exit(__doc__)
with NanoCtrlClient(sys.argv[1], scope="my-session") as client:
    client.check_connection()
    client.register("prefill-0", ENGINE)
    client.start_heartbeat(on_not_found=lambda: client.register("prefill-0", ENGINE))
    for engine in client.list_engines():
        print(engine["id"], engine["role"], f"{engine['host']}:{engine['port']}")
