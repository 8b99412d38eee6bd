"""Stages as processes: starts them, assigns GPUs, tracks which are alive, and checks what a run may do."""
