"""What a shard is: the tar, its index and the pictures and captions in it."""
