"""Stages as processes: started, given a GPU, watched, trusted."""
