"""make serve: the server, its gate and its deployments."""
