"""What the Prefect UI shows: progress, charts and verdicts, redacted."""
