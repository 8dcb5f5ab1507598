"""Drift reports: how far an adapter has moved a model, drawn, checked against limits, and projected back."""
