"""Fisher statistics of an aligned model: what they hold, and the pass that estimates them."""
