"""computemesh: LLM work across your GPU and CPU machines, over NATS and nothing else."""

__version__ = "0.1.0"
