"""Every conversation of the mesh, one file each. This package is the map of the bus; ``catalog`` lists it."""
