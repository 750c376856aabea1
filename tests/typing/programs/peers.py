"""A program that reads and writes the memory of others, and one with an event loop that does."""

from typing import assert_type

from computemesh.peer import (
    MessageFuture,
    PeerConnection,
    PeerMemoryRegion,
    TransferFuture,
    start_async_peer_agent,
    start_peer_agent,
)


def use() -> None:
    with start_peer_agent("127.0.0.1:3000", alias="a", scope="job") as agent:
        region = agent.allocate_memory_region("kv", 4096)
        assert_type(region, PeerMemoryRegion)
        assert_type(region.view, memoryview)
        assert_type(agent.register_memory_region("own", bytearray(8)), int)
        conn = agent.connect_to("b", transport="tcp")
        assert_type(conn.wait(timeout=5), PeerConnection)
        future = agent.read("b", [("kv", 0, 0, 8), ("kv", "other", 0, 0, 8), (1, 2, 0, 0, 8)])
        assert_type(future, TransferFuture)
        assert_type(future.wait(timeout=5), int)
        assert_type(future.wait_for(0.1), int | None)
        assert_type(future.epochs, tuple[int, ...])
        future.add_done_callback(lambda done: assert_type(done.transport, str))
        assert_type(agent.imm_recv("b").imm_data(), int)
        assert_type(agent.recv("b", (bytearray(8), 0, 8)).received, int)
        agent.read("b", ("kv", 0, 0))  # expect: arg-type reportArgumentType
        agent.write("b", "kv")  # expect: arg-type reportArgumentType
        agent.allocate_memory_region("kv", "4096")  # expect: arg-type reportArgumentType
    start_peer_agent(name="a")  # expect: call-arg reportCallIssue


async def await_it() -> None:
    async with await start_async_peer_agent(alias="a", local_host="10.0.0.1") as agent:
        assert_type(await agent.connect_to("b", transport="tcp", timeout=5), PeerConnection)
        assert_type(await agent.read("b", ("kv", 0, 0, 8)), TransferFuture)
        assert_type(await agent.recv("b", bytearray(8)), MessageFuture)
        await agent.register_memory_region("own", bytearray(8), writable=False)
        await agent.connect_to("b", by="tcp")  # expect: call-arg reportCallIssue
        await agent.register_memory_region("own", bytearray(8), readable=True)  # expect: call-arg reportCallIssue
    await start_async_peer_agent(name="a")  # expect: call-arg reportCallIssue
