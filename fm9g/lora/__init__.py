"""LoRA adapters in a plain model, and their files."""
