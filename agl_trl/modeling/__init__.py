"""Models and adapters: loading, the layers that LoRA adapts, answers and likelihoods."""
