"""Files that travel with an adapter: written whole or not at all, read with a reason when refused."""
