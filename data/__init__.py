"""From pictures and shards to samples; knows no model."""
