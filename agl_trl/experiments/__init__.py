"""The demo and the scaling law of forgetting."""
