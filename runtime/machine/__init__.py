"""What this machine offers: devices, memory, cores, object stores by their address."""
