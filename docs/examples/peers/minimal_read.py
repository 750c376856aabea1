"""Two agents, and eight bytes that one reads from the other."""

from array import array

from computemesh.peer import start_peer_agent

scope = "peeragent-api-demo"

initiator = start_peer_agent(nanoctrl_url="http://127.0.0.1:3000", scope=scope)
target = start_peer_agent(nanoctrl_url="http://127.0.0.1:3000", scope=scope)

initiator_conn = initiator.connect_to(target.alias, ib_port=1, qp_num=1)
target_conn = target.connect_to(initiator.alias, ib_port=1, qp_num=1)
initiator_conn.wait()
target_conn.wait()

local = array("B", [0] * 16)
remote = array("B", [1] * 16)

initiator.register_memory_region("kv", local.buffer_info()[0], 0, len(local))
target.register_memory_region("kv", remote.buffer_info()[0], 0, len(remote))

future = initiator.read(target.alias, [("kv", 8, 0, 8)])
future.wait()

print(future.transport, local.tolist())

initiator.shutdown()
target.shutdown()
