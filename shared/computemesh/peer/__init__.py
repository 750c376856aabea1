"""Memory of other processes, on this machine and others: find it by name, read it, write it."""
