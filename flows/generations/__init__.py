"""A line of recovered models: its generations, their history and their aliases."""
