"""The whole line on two CPU cores: clips of its own, their reader, a local S3 server."""
