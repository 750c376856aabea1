"""``nodes``: who is in the mesh, and who may join it."""

from __future__ import annotations

import click

from computemesh.cli import access, common, complete
from computemesh.cli.common import Cell, ago, out, print_json, state_cell, table
from computemesh.contracts import nodes
from computemesh.contracts.nodes import NodeList, NodeRecord, NodesQuery
from computemesh.hardware import Tier


class TierChoice(click.Choice[str]):
    """A tier in any case, shown as it stands on the wire."""

    def normalize_choice(self, choice: object, ctx: click.Context | None) -> str:
        return str(choice).upper()


@click.group(name="nodes", invoke_without_command=True)
@click.option("--online", is_flag=True, help="Only nodes that are online.")
@click.option("--gpu", is_flag=True, help="Only nodes with a GPU.")
@click.option("--min-tier", type=TierChoice([t.value for t in Tier]), help="At least this tier, in any case.")
@click.option("--work-type", default="", help="Only nodes that take this work.", shell_complete=complete.work_types)
@click.option("--model", default="", help="Only nodes that serve this model.", shell_complete=complete.models)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def nodes_group(
    context: click.Context,
    online: bool,
    gpu: bool,
    min_tier: str | None,
    work_type: str,
    model: str,
    as_json: bool,
) -> None:
    """List the nodes of the mesh and what they can do; invite one, or revoke it."""
    if context.invoked_subcommand is not None:
        return
    query = NodesQuery(
        online_only=online,
        requires_gpu=gpu,
        min_tier=Tier(min_tier) if min_tier else None,
        work_type=work_type,
        model_name=model,
    )

    async def fetch() -> NodeList:
        async with common.connected() as bus:
            return await common.ask(bus, nodes.QUERY, query)

    found = common.run(fetch())
    if as_json:
        print_json(found)
        return
    if not found.nodes:
        out.print("No nodes." if query == NodesQuery() else "No such nodes.")
        return
    columns = ["node", "state", "tier", "CPUs", "RAM", "GPUs", "slots", "delivery", "seen", "work", "models"]
    table(columns, [_row(node) for node in found.nodes], right=["CPUs", "RAM", "slots", "seen"])


nodes_group.add_command(access.invite)
nodes_group.add_command(access.revoke)


def _row(node: NodeRecord) -> tuple[Cell, ...]:
    return (
        node.node_id,
        state_cell(node.state, "" if node.monitored else " (unmonitored)"),
        node.tier.value,
        str(node.cpu.threads) if node.cpu and node.cpu.threads else "-",
        f"{node.memory.total_mb / 1024:.0f} GiB" if node.memory and node.memory.total_mb else "-",
        ", ".join(f"{gpu.name} {gpu.vram_total_mb // 1024} GiB" for gpu in node.gpus) or "-",
        str(node.slots),
        node.delivery,
        ago(node.last_seen),
        ", ".join(node.work_types) or "any",
        ", ".join(node.models) or "any",
    )
