"""Requests to the engines of this machine, from the bus and from the agent's own HTTP edge."""

from computemesh_services.node_agent.infer.door import Door
from computemesh_services.node_agent.infer.upstream import EngineAnswer, Inference

__all__ = ["Door", "EngineAnswer", "Inference"]
