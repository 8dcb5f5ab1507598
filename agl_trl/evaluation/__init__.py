"""What base and tuned model do with the same prompts, and the judges of their answers."""
