"""The command line `agl-trl`."""
