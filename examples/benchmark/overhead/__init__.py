"""What the protection costs: step time, memory, the Fisher pass, files, and how these grow."""
