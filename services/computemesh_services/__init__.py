"""The services of the mesh: each a process of its own, none imports another."""
