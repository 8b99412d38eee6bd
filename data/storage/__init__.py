"""Where bytes come from: local files, http(s) and s3, with retries and a cache."""
