"""How it is judged: a CLIP judge, metrics, comparisons and the report."""
