"""The outside world: the database, the blobs, the bytes of images."""
