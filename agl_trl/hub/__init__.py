"""Model cards, and pushes that arrive whole or not at all."""
