"""What is trained: one file a model family, LoRA, encodings, sampling and the maths of flow matching."""
