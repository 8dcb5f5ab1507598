"""AGL in training front ends, each run on the embedded model with a small program of its own."""
