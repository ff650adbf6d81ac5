"""Resources of this machine: devices, memory, cores, and URLs of object stores."""
