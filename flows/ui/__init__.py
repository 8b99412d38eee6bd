"""What is shown in the Prefect UI."""
