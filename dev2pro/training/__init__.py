"""How it is trained: the optimizer step, its inputs, its measurements and its checkpoints."""
