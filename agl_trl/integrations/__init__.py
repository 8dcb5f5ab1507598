"""AGL as a plugin of front ends that take one."""
