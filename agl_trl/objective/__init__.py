"""The maths of AlignGuard-LoRA. Imports torch alone."""
