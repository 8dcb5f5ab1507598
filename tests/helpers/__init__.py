"""What tests share: brute-force twins, tiny models, a local Hub, two processes."""
