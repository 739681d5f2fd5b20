"""What carries out cells: this process, several on this machine, a Ray cluster."""
